/* A JPEG decoder that makes only the pixels that a crop needs, with the same bytes that libjpeg-turbo makes of the whole.
 *
 * Entry points: decode() decodes a window of a JPEG into a buffer for the whole image and returns True, or False if this is
 * not a JPEG for this decoder; runs_here() tells whether the CPU has AVX2 and BMI2. kernel.decode_window() calls them.
 *
 * It decodes the JPEGs that records and most photographs are: baseline, 8 bits, YCbCr at 4:2:0, 4:2:2 or 4:4:4, one scan,
 * no restart markers. At anything else, and at the first damage, it returns False without a reason: the caller then asks
 * libjpeg-turbo, which alone decides what is an error. All coefficients are read, up to the end-of-image marker, but only
 * the blocks that the crop needs become pixels. So an image is good or bad as a whole, whatever the crop and the machine.
 *
 * Memory safety, whatever the input bytes are:
 * - decode() checks the buffer's size and that the window lies within the image, before anything else.
 * - Segments are read within their length, which is checked against the end of the payload. The frame's size must be the
 *   size that the caller gave, at most MAX_SIDE, so that planes of a fixed size are large enough.
 * - Coded bytes are copied to coded_bytes, followed by SPARE_BYTES zeros; the position is checked after each unit (_entropy.h).
 * - Vectors may read past a row's samples: planes have MARGIN bytes on both sides. They never write past a row of the
 *   output: the last pixels of the image's rows go through a buffer.
 *
 * Tables and planes are static, because the next image nearly always has the same tables; the GIL guards them. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) && !defined(LOADER_SERVICE_PORTABLE) /* as VECTORS_X86 in _rows.h */

#define ALWAYS_INLINE static inline __attribute__((always_inline))
#define TARGET_JPEG __attribute__((target("avx2,bmi2")))

#include "_entropy.h"
#include "_pixels.h"

enum {
    MIN_SIDE = 16,           /* libjpeg upsamples the chroma of narrower images by another rule */
    MAX_SIDE = 1024,         /* types.MAX_SIDE_PX */
    MARGIN = 64,             /* bytes on both sides of a plane's rows, which vectors may read */
    STRIDE = MAX_SIDE + 2 * MARGIN,
    MAX_BYTES = 1 << 22,     /* of a JPEG: more than the largest at quality 100 */
    BLOCK_STRIDE = 80,       /* items between blocks: 64, one for dropped coefficients, rounded up to whole vectors */
};

typedef struct {
    int h, v;                /* blocks per unit (MCU), across and down */
    const int16_t *quantisation;
    Huffman *dc, *ac;
    int last_dc;
} Component;

/* An image's size in pixels, and the window that is needed: rows [top, bottom) and columns [left, right). */
typedef struct {
    int height, width;
    int top, left, bottom, right;
} Window;

static struct {
    Component components[3];
    int16_t quantisation[4][BLOCK_ITEMS]; /* in natural order */
    int has_quantisation[4], has_frame, has_profile;
    Huffman huffman[2][4];   /* DC and AC */
    int has_huffman[2][4];   /* 1 if this image defines it: a table of an earlier image must not serve */
    uint8_t table_of[3];
} D;

/* Apart from D, and aligned to no more than 32 bytes, so that sanitizers find an access beyond one of them. */
static int16_t unit_blocks[6 * BLOCK_STRIDE] __attribute__((aligned(32)));
static uint8_t coded_bytes[MAX_BYTES + SPARE_BYTES];
static uint8_t sample_planes[3][(MAX_SIDE + 16) * STRIDE] __attribute__((aligned(32)));

/* ---- headers: each function takes the content of a segment, and returns 0 at anything that is not expected ---- */

static int read_quantisation(const uint8_t *p, const uint8_t *end)
{
    for (; p < end; p += 1 + BLOCK_ITEMS) {
        if (end - p < 1 + BLOCK_ITEMS || *p > 3) /* above 3: 16-bit items, or a bad index */
            return 0;
        for (int i = 0; i < BLOCK_ITEMS; i++)
            D.quantisation[*p][ZIGZAG[i]] = p[1 + i];
        D.has_quantisation[*p] = 1;
    }
    return 1;
}

static int read_huffman(const uint8_t *p, const uint8_t *end)
{
    while (p < end) {
        if (end - p < 17 || (*p & ~0x13) != 0) /* class 0 or 1, index 0 to 3 */
            return 0;
        const int is_ac = *p >> 4, index = *p & 3;
        int n = 0;
        for (int i = 1; i <= 16; i++)
            n += p[i];
        if (n < 1 || n > 256 || end - p < 17 + n || !make_huffman(&D.huffman[is_ac][index], p + 1, p + 17, n, is_ac))
            return 0;
        D.has_huffman[is_ac][index] = 1;
        p += 17 + n;
    }
    return 1;
}

static int read_frame(const uint8_t *p, const uint8_t *end, const Window *w)
{
    if (D.has_frame || end - p != 15 || p[0] != 8 || (p[1] << 8 | p[2]) != w->height || (p[3] << 8 | p[4]) != w->width ||
        p[5] != 3)
        return 0;
    for (int i = 0; i < 3; i++) {
        const uint8_t *c = p + 6 + 3 * i;
        D.components[i].h = c[1] >> 4;
        D.components[i].v = c[1] & 15;
        if (c[0] != i + 1 || c[2] > 3 || (i > 0 && c[1] != 0x11)) /* JFIF's ids; one block of chroma a unit */
            return 0;
        D.table_of[i] = c[2];
    }
    D.has_frame = 1;
    const int luma = p[7];
    return luma == 0x22 || luma == 0x21 || luma == 0x11; /* 4:2:0, 4:2:2, 4:4:4 */
}

static int read_scan(const uint8_t *p, const uint8_t *end)
{
    if (!D.has_frame || end - p != 10 || p[0] != 3 || p[7] != 0 || p[8] != 63 || p[9] != 0) /* not progressive */
        return 0;
    for (int i = 0; i < 3; i++) {
        const int id = p[1 + 2 * i], dc = p[2 + 2 * i] >> 4, ac = p[2 + 2 * i] & 15;
        Component *c = &D.components[i];
        if (id != i + 1 || dc > 3 || ac > 3 || !D.has_huffman[0][dc] || !D.has_huffman[1][ac] ||
            !D.has_quantisation[D.table_of[i]])
            return 0;
        c->dc = &D.huffman[0][dc];
        c->ac = &D.huffman[1][ac];
        c->quantisation = D.quantisation[D.table_of[i]];
        c->last_dc = 0;
    }
    return 1;
}

/* libjpeg-turbo puts the parts of a colour profile together, and refuses the JPEG if one is missing or comes twice. Here, 1
 * for a profile of a single part, which is what files this small have. */
static int read_profile(const uint8_t *p, const uint8_t *end)
{
    enum { NUMBER = 12, COUNT = 13, HEADER = 14 };
    if (end - p < NUMBER || memcmp(p, "ICC_PROFILE", NUMBER) != 0) /* with its zero: 12 bytes */
        return 1; /* APP2 of another kind */
    if (D.has_profile || end - p <= HEADER || p[NUMBER] != 1 || p[COUNT] != 1)
        return 0;
    D.has_profile = 1;
    return 1;
}

/* 1 for a segment that does not change the pixels, and in which libjpeg-turbo would find nothing wrong. A JFIF segment says
 * YCbCr, which is also the default without one. */
static int may_skip(int marker, const uint8_t *p, const uint8_t *end)
{
    if (marker == 0xE0)
        return end - p >= 14 && memcmp(p, "JFIF\0\1", 6) == 0;
    if (marker == 0xE2)
        return read_profile(p, end);
    return marker == 0xFE || (marker > 0xE0 && marker <= 0xEF && marker != 0xEE); /* not Adobe's, which may say RGB */
}

/* Read all segments up to the scan; return the start of the coded bytes, or NULL if this decoder cannot decode the image. */
static const uint8_t *read_headers(const uint8_t *p, const uint8_t *end, const Window *w)
{
    memset(D.has_quantisation, 0, sizeof D.has_quantisation);
    memset(D.has_huffman, 0, sizeof D.has_huffman);
    D.has_frame = D.has_profile = 0;
    if (end - p < 2 || p[0] != 0xFF || p[1] != 0xD8)
        return NULL;
    for (p += 2; end - p >= 4 && p[0] == 0xFF;) {
        const int marker = p[1], size = p[2] << 8 | p[3];
        const uint8_t *content = p + 4, *next = p + 2 + size;
        if (size < 2 || end - (p + 2) < size)
            return NULL;
        const int fine = marker == 0xDB   ? read_quantisation(content, next)
                         : marker == 0xC4 ? read_huffman(content, next)
                         : marker == 0xC0 ? read_frame(content, next, w)
                         : marker == 0xDA ? read_scan(content, next)
                                          : may_skip(marker, content, next);
        if (!fine)
            return NULL;
        if (marker == 0xDA)
            return next;
        p = next;
    }
    return NULL;
}

/* Copy the coded bytes to coded_bytes without the zero after each 0xFF; return their number. Returns -1 if a marker other than
 * end-of-image interrupts them. */
static ptrdiff_t unstuff(const uint8_t *p, const uint8_t *end)
{
    uint8_t *out = coded_bytes;
    if (end - p > MAX_BYTES)
        return -1;
    for (;;) {
        const uint8_t *mark = memchr(p, 0xFF, (size_t)(end - p));
        if (mark == NULL || end - mark < 2)
            return -1;
        const size_t n = (size_t)(mark - p) + (mark[1] == 0);
        memcpy(out, p, n);
        out += n;
        p = mark + 2;
        if (mark[1] != 0)
            break;
    }
    memset(out, 0, SPARE_BYTES); /* read_block() may read past the end; read_blocks() notices it afterwards */
    return p[-1] == 0xD9 ? out - coded_bytes : -1;
}

/* ---- blocks ---- */

/* Transform the blocks of the unit at (row, column) into the planes. Returns 0 if a block's samples would differ from
 * libjpeg-turbo's. */
TARGET_JPEG static int make_unit(int row, int column)
{
    const int16_t *tables[6];
    uint8_t *outs[6];
    int n = 0;
    for (int i = 0; i < 3; i++) {
        const Component *c = &D.components[i];
        for (int y = 0; y < c->v; y++)
            for (int x = 0; x < c->h; x++, n++) {
                tables[n] = c->quantisation;
                outs[n] = sample_planes[i] + (8 * (row * c->v + y)) * STRIDE + MARGIN + 8 * (column * c->h + x);
            }
    }
    for (int i = 0; i < n; i += 2) { /* two at a time; the last of three blocks is paired with itself */
        const int other = i + 1 < n ? i + 1 : i;
        if (!inverse_dct(unit_blocks + i * BLOCK_STRIDE, unit_blocks + other * BLOCK_STRIDE, tables[i], tables[other], outs[i],
                         outs[other], STRIDE))
            return 0;
    }
    return 1;
}

/* Read all blocks and transform those that the window needs; 0 if the n coded bytes are damaged, too few or too many. */
TARGET_JPEG static int read_blocks(ptrdiff_t n, const Window *w)
{
    const int width = 8 * D.components[0].h, height = 8 * D.components[0].v, blocks = 2 + width * height / 64;
    Bits bits = {.next = coded_bytes};
    memset(unit_blocks, 0, sizeof unit_blocks);
    for (int row = 0; row * height < w->height; row++) {
        /* + 2 and - 2: upsampled chroma depends on samples up to two pixels away */
        const int needed = row * height < w->bottom + 2 && (row + 1) * height > w->top - 2;
        for (int column = 0; column * width < w->width; column++) {
            int16_t *block = unit_blocks;
            for (int i = 0; i < 3; i++) {
                Component *c = &D.components[i];
                for (int k = c->h * c->v; k > 0; k--, block += BLOCK_STRIDE)
                    if (!read_block(&bits, c->dc, c->ac, block, &c->last_dc))
                        return 0;
            }
            if (bits.next - coded_bytes - bits.left / 8 > n) /* before the spare bytes run out: once per unit is enough */
                return 0;
            if (needed && column * width < w->right + 2 && (column + 1) * width > w->left - 2 && !make_unit(row, column))
                return 0;
            memset(unit_blocks, 0, sizeof *unit_blocks * BLOCK_STRIDE * (size_t)blocks);
        }
    }
    const ptrdiff_t rest = 8 * (n - (bits.next - coded_bytes)) + bits.left; /* bits after the last block: padding to a byte */
    return rest >= 0 && rest < 8;
}

/* ---- pixels ---- */

/* The row of samples of component i for row y of the image. *far is the second row of vertical upsampling, with a weight
 * of 1/4, or NULL if the component has all rows. */
static const uint8_t *sample_row(int i, int y, const Window *w, const uint8_t **far)
{
    const uint8_t *plane = sample_planes[i] + MARGIN;
    *far = NULL;
    if (i == 0 || D.components[0].v == 1)
        return plane + y * STRIDE;
    const int last = (w->height + 1) / 2 - 1, near = y / 2, other = y % 2 == 0 ? near - 1 : near + 1;
    *far = plane + (other < 0 ? 0 : other > last ? last : other) * STRIDE;
    return plane + near * STRIDE;
}

/* Repeat the first and last chroma sample of each row beyond its ends, as libjpeg does for the pixels at the edges. */
static void extend_rows(const Window *w)
{
    const int width = (w->width + 1) / 2, height = D.components[0].v == 2 ? (w->height + 1) / 2 : w->height;
    for (int i = 1; i < 3; i++)
        for (int y = 0; y < height; y++) {
            uint8_t *row = sample_planes[i] + y * STRIDE + MARGIN;
            row[-1] = row[0];
            row[width] = row[width - 1];
        }
}

TARGET_JPEG ALWAYS_INLINE void make_pixels(uint8_t *out, int item, const Window *w)
{
    const int halved = D.components[0].h == 2;
    uint8_t last[4 * STEP_PX];
    if (halved)
        extend_rows(w);
    for (int y = w->top; y < w->bottom; y++) {
        const uint8_t *far[3], *near[3];
        for (int i = 0; i < 3; i++)
            near[i] = sample_row(i, y, w, &far[i]);
        for (int x = w->left & ~1; x < w->right; x += STEP_PX) { /* even: two pixels share their colours' samples */
            uint8_t *at = out + item * ((ptrdiff_t)y * w->width + x);
            const __m256i luma = _mm256_loadu_si256((const __m256i *)(near[0] + x));
            __m256i c[2];
            for (int i = 0; i < 2; i++)
                c[i] = halved ? upsampled(near[i + 1] + x / 2, far[i + 1] == NULL ? NULL : far[i + 1] + x / 2)
                              : _mm256_loadu_si256((const __m256i *)(near[i + 1] + x));
            /* A whole step may overwrite pixels right of the window, but never beyond the image's row. */
            write_pixels(x + STEP_PX <= w->width ? at : last, item, luma, c[0], c[1]);
            if (x + STEP_PX > w->width)
                memcpy(at, last, (size_t)(item * (w->width - x)));
        }
    }
}

TARGET_JPEG static void make_pixels_of_3(uint8_t *out, const Window *w) { make_pixels(out, 3, w); }
TARGET_JPEG static void make_pixels_of_4(uint8_t *out, const Window *w) { make_pixels(out, 4, w); }

static int runs(void) { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi2"); }

static int decode_window(const Py_buffer *payload, uint8_t *out, int item, const Window *w)
{
    const uint8_t *begin = payload->buf, *end = begin + payload->len;
    if (w->height < MIN_SIDE || w->width < MIN_SIDE || !runs())
        return 0;
    const uint8_t *scan = read_headers(begin, end, w);
    if (scan == NULL)
        return 0;
    const ptrdiff_t n = unstuff(scan, end);
    if (n < 0 || !read_blocks(n, w))
        return 0;
    (item == 3 ? make_pixels_of_3 : make_pixels_of_4)(out, w);
    return 1;
}

static void make_tables(void)
{
    make_places();
    make_places_rgb();
}

#else /* no decoder for this machine: decode_window() always declines, and libjpeg-turbo decodes */

typedef struct {
    int height, width;
    int top, left, bottom, right;
} Window;
enum { MAX_SIDE = 1024 };
static void make_tables(void) {}
static int runs(void) { return 0; }
static int decode_window(const Py_buffer *payload, uint8_t *out, int item, const Window *w)
{
    (void)payload, (void)out, (void)item, (void)w;
    return 0;
}

#endif

/* ---- the module ---- */

PyDoc_STRVAR(decode_doc, "decode(payload, into, picture_height, picture_width, top, left, height, width): see kernel.decode_window.");

static PyObject *decode(PyObject *module, PyObject *args)
{
    (void)module;
    Py_buffer payload = {0}, into = {0};
    Window w;
    int height, width, made = -1;
    if (!PyArg_ParseTuple(args, "y*w*iiiiii", &payload, &into, &w.height, &w.width, &w.top, &w.left, &height, &width))
        return NULL;
    const int fits = w.height > 0 && w.width > 0 && w.height <= MAX_SIDE && w.width <= MAX_SIDE;
    const int item = fits && into.len % (w.height * w.width) == 0 ? (int)(into.len / (w.height * w.width)) : 0;
    if (item != 3 && item != 4)
        PyErr_Format(PyExc_ValueError, "%zd bytes are no room for %d x %d pixels", into.len, w.height, w.width);
    else if (w.top < 0 || w.left < 0 || height < 1 || width < 1 || w.top > w.height - height || w.left > w.width - width)
        PyErr_Format(PyExc_ValueError, "a window of %d x %d at (%d, %d) does not lie within %d x %d pixels", height, width,
                     w.top, w.left, w.height, w.width);
    else {
        w.bottom = w.top + height, w.right = w.left + width;
        made = decode_window(&payload, into.buf, item, &w);
    }
    PyBuffer_Release(&payload);
    PyBuffer_Release(&into);
    return made < 0 ? NULL : PyBool_FromLong(made);
}

static PyObject *runs_here(PyObject *module, PyObject *args)
{
    (void)module, (void)args;
    return PyBool_FromLong(runs());
}

static PyMethodDef METHODS[] = {
    {"decode", decode, METH_VARARGS, decode_doc},
    {"runs_here", runs_here, METH_NOARGS, "runs_here(): True if this CPU can run decode()."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef MODULE = {PyModuleDef_HEAD_INIT, "_jpeg", "See kernel.py.", 0, METHODS, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__jpeg(void)
{
    make_tables();
    return PyModule_Create(&MODULE);
}
