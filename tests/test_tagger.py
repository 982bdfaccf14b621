"""A tagger's network sees the picture as it was trained to, and its tags become a prompt."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm.errors import LdmError
from ldm.tagger import load_tagger, prepared
from scripts import interrogate as script

TABLE = """tag_id,name,category,count
1,general,9,10
2,very_red,0,10
3,blue_(sea),0,10
4,\\o/,4,10
"""
RED = Image.new("RGB", (8, 8), (255, 0, 0))

needs_onnx = pytest.mark.skipif(
    not (importlib.util.find_spec("onnxruntime") and importlib.util.find_spec("onnx")),
    reason="needs onnxruntime and onnx",
)


@pytest.fixture
def network(tmp_path: Path) -> Path:
    """A network whose four outputs are 0.9, and the mean blue, red and green of the picture from 0 to 1."""
    from onnx import TensorProto, checker, helper, numpy_helper, save

    def constant(name: str, *values: float):
        return numpy_helper.from_array(np.array(values, np.float32), name)

    # Where inputs are blue, green, red: outputs are a constant, red, blue, green.
    order = np.array([[0, 0, 1, 0], [0, 0, 0, 1], [0, 1, 0, 0]], np.float32) / 255
    graph = helper.make_graph(
        [
            helper.make_node("ReduceMean", ["picture"], ["mean"], axes=[1, 2], keepdims=0),
            helper.make_node("MatMul", ["mean", "order"], ["moved"]),
            helper.make_node("Add", ["moved", "first"], ["tags"]),
        ],
        "tagger",
        [helper.make_tensor_value_info("picture", TensorProto.FLOAT, ["N", 8, 8, 3])],
        [helper.make_tensor_value_info("tags", TensorProto.FLOAT, ["N", 4])],
        [numpy_helper.from_array(order, "order"), constant("first", 0.9, 0, 0, 0)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    checker.check_model(model)
    path = tmp_path / "tagger.onnx"
    save(model, path)
    (tmp_path / "tagger.csv").write_text(TABLE)
    return path


@needs_onnx
def test_tags_above_the_threshold_become_a_prompt(network: Path):
    tagger = load_tagger(network)
    image = Image.new("RGB", (8, 8), (255, 128, 102))
    assert tagger.probabilities(image) == pytest.approx(
        {"very_red": 1, "blue_(sea)": 0.4, "\\o/": 128 / 255}, abs=1e-5
    )
    # Alphabetical, blanks for underscores, brackets and backslashes escaped, ratings never.
    assert tagger.prompt(image) == "\\\\o/, blue \\(sea\\), very red"
    assert tagger.prompt(image, threshold=0.45) == "\\\\o/, very red"
    assert tagger.prompt(image, threshold=0.45, leave_out=["very_red"]) == "\\\\o/"


@needs_onnx
def test_what_does_not_fit_is_refused_in_one_line(network: Path, tmp_path: Path):
    (tmp_path / "few.csv").write_text("name,category\na,0\n")
    with pytest.raises(LdmError, match="4 outputs but its list 1 tags"):
        load_tagger(network, tmp_path / "few.csv").prompt(RED)
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(LdmError, match="no column 'name'"):
        load_tagger(network, tmp_path / "other.csv")
    with pytest.raises(LdmError, match=r"cannot read gone.csv"):
        load_tagger(network, tmp_path / "gone.csv")
    (tmp_path / "bad.onnx").write_bytes(b"\x08\x07not a network")
    with pytest.raises(LdmError, match=r"^bad.onnx: onnxruntime cannot use it") as caught:
        load_tagger(tmp_path / "bad.onnx", network.with_suffix(".csv"))
    assert len(str(caught.value)) <= 200


@needs_onnx
def test_the_script_tags(network: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    RED.save(tmp_path / "red.png")
    assert script.main([str(tmp_path / "red.png"), "--tagger", str(network)]) == 0
    assert capsys.readouterr().out == "very red\n"


def test_without_onnxruntime_one_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(LdmError, match="pip install onnxruntime"):
        load_tagger("tagger.onnx")


def test_a_picture_is_laid_whole_on_a_white_square_in_bgr():
    pixels = prepared(Image.new("RGB", (20, 10), (255, 0, 0)), 8)
    assert pixels.shape == (1, 8, 8, 3)
    assert pixels.dtype == np.float32
    assert (pixels[0, 0] == 255).all()
    assert (pixels[0, 4] == (0, 0, 255)).all()
