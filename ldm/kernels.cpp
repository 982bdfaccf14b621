// The inner loops of ldm/optimization.py. Feature maps are channels-last: (B, h, w, C), float32, C a multiple of 16.
//
// Plain loops over vectors of 16 numbers, which the compiler maps to what the processor has (one register of
// AVX-512, two of AVX2, four of NEON).

#include <cstdint>

typedef float Vector __attribute__((vector_size(64), aligned(4), may_alias));

static const int64_t LANES = 16;

static inline Vector load(const float* p) { return *(const Vector*)p; }

static inline void store(float* p, Vector v) { *(Vector*)p = v; }

// Winograd's minimal filtering F(4x4, 3x3) (Lavin and Gray 2015, arXiv:1509.09308, section 4.1): a tile of 6x6
// inputs gives 4x4 outputs from 36 multiplications per pair of channels in place of 144. The transforms
// evaluate polynomials at 0, -a, a, -b, b and infinity. The paper has a = 1, b = 2; a = 2/3, b = 3/2 leaves a
// quarter of the rounding error (such points: Barabasz et al. 2020, arXiv:1803.10986). Note that a b = 1.

static const float a = 2.0f / 3, b = 3.0f / 2, aa = a * a, bb = b * b;

// B^T d of equation 8: six numbers in a row or column of a tile of inputs.
static inline void transform_input(const Vector d[6], Vector out[6]) {
    Vector even_a = d[4] - bb * d[2], odd_a = a * (d[3] - bb * d[1]);
    Vector even_b = d[4] - aa * d[2], odd_b = b * (d[3] - aa * d[1]);
    out[0] = d[0] - (aa + bb) * d[2] + d[4];
    out[1] = even_a + odd_a;
    out[2] = even_a - odd_a;
    out[3] = even_b + odd_b;
    out[4] = even_b - odd_b;
    out[5] = d[1] - (aa + bb) * d[3] + d[5];
}

// A^T m of equation 8: back to four outputs.
static inline void transform_output(const Vector m[6], Vector out[4]) {
    Vector even_a = m[1] + m[2], odd_a = a * (m[1] - m[2]);
    Vector even_b = m[3] + m[4], odd_b = b * (m[3] - m[4]);
    out[0] = m[0] + even_a + even_b;
    out[1] = odd_a + odd_b;
    out[2] = aa * even_a + bb * even_b;
    out[3] = aa * odd_a + bb * odd_b + m[5];
}

// G g of equation 8: a row or column of a 3x3 filter.
static inline void transform_filter(const Vector g[3], Vector out[6]) {
    const float at_a = 1 / (2 * aa * (aa - bb)), at_b = 1 / (2 * bb * (bb - aa));
    Vector even_a = at_a * (g[0] + aa * g[2]), odd_a = at_a * a * g[1];
    Vector even_b = at_b * (g[0] + bb * g[2]), odd_b = at_b * b * g[1];
    out[0] = g[0];
    out[1] = even_a + odd_a;
    out[2] = even_a - odd_a;
    out[3] = even_b + odd_b;
    out[4] = even_b - odd_b;
    out[5] = g[2];
}

// A convolution's weight (outputs, inputs, 3, 3) -> (36, inputs, outputs).
extern "C" void winograd_filter(const float* weight, float* matrices, int64_t inputs, int64_t outputs) {
#pragma omp parallel for
    for (int64_t o = 0; o < outputs; o += LANES)
        for (int64_t i = 0; i < inputs; i++) {
            Vector filter[3][3], columns[6][3], line[3], out[6];
            for (int lane = 0; lane < LANES; lane++)
                for (int k = 0; k < 9; k++) filter[k / 3][k % 3][lane] = weight[((o + lane) * inputs + i) * 9 + k];
            for (int k = 0; k < 3; k++) {
                for (int j = 0; j < 3; j++) line[j] = filter[j][k];
                transform_filter(line, out);
                for (int j = 0; j < 6; j++) columns[j][k] = out[j];
            }
            for (int j = 0; j < 6; j++) {
                transform_filter(columns[j], out);
                for (int k = 0; k < 6; k++) store(matrices + ((j * 6 + k) * inputs + i) * outputs + o, out[k]);
            }
        }
}

// Where a tile lies. Tiles are counted along the rows of a picture, then down, then picture by picture.
struct Tile {
    int64_t picture, y, x;

    Tile(int64_t index, int64_t height, int64_t width) {
        int64_t down = (height + 3) / 4, across = (width + 3) / 4;
        picture = index / (down * across);
        y = index / across % down * 4;
        x = index % across * 4;
    }
};

// The tiles first ... first + count - 1 of x (B, height, width, channels), transformed: (36, count, channels).
// zeros: a pixel of zeros, for what lies outside of the picture.
extern "C" void winograd_input(const float* x, float* tiles, int64_t height, int64_t width, int64_t channels,
                               int64_t first, int64_t count, const float* zeros) {
#pragma omp parallel for
    for (int64_t t = 0; t < count; t++) {
        Tile tile(first + t, height, width);
        const float* pixels[6][6];
        for (int i = 0; i < 6; i++)
            for (int j = 0; j < 6; j++) {
                int64_t py = tile.y + i - 1, px = tile.x + j - 1;
                bool inside = py >= 0 && py < height && px >= 0 && px < width;
                pixels[i][j] = inside ? x + ((tile.picture * height + py) * width + px) * channels : zeros;
            }
        for (int64_t c = 0; c < channels; c += LANES) {
            Vector columns[6][6], line[6], out[6];
            for (int j = 0; j < 6; j++) {
                for (int i = 0; i < 6; i++) line[i] = load(pixels[i][j] + c);
                transform_input(line, out);
                for (int i = 0; i < 6; i++) columns[i][j] = out[i];
            }
            for (int i = 0; i < 6; i++) {
                transform_input(columns[i], out);
                for (int j = 0; j < 6; j++) store(tiles + ((i * 6 + j) * count + t) * channels + c, out[j]);
            }
        }
    }
}

// The way back from tiles (36, count, channels): writes y (B, height, width, channels), with the bias added.
extern "C" void winograd_output(const float* tiles, const float* bias, float* y, int64_t height, int64_t width,
                                int64_t channels, int64_t first, int64_t count) {
#pragma omp parallel for
    for (int64_t t = 0; t < count; t++) {
        Tile tile(first + t, height, width);
        for (int64_t c = 0; c < channels; c += LANES) {
            Vector columns[4][6], line[6], out[4];
            for (int j = 0; j < 6; j++) {
                for (int i = 0; i < 6; i++) line[i] = load(tiles + ((i * 6 + j) * count + t) * channels + c);
                transform_output(line, out);
                for (int i = 0; i < 4; i++) columns[i][j] = out[i];
            }
            for (int i = 0; i < 4 && tile.y + i < height; i++) {
                transform_output(columns[i], out);
                float* row = y + ((tile.picture * height + tile.y + i) * width + tile.x) * channels + c;
                for (int j = 0; j < 4 && tile.x + j < width; j++)
                    store(row + j * channels, out[j] + load(bias + c));
            }
        }
    }
}
