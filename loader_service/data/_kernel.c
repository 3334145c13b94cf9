/* The compiled kernel: the inner loops of the loader, one slice per call.
 *
 * Entry points (see METHODS): augment() makes samples from raw records, copy() copies a frame to a slot, add() adds an image
 * to the sums of preprocessing, walk() computes record numbers of positions, forms() lists the forms that this CPU can run.
 * The NumPy forms in augment.py, kernel.py and order.py define the bytes; tests compare these forms with them bit for bit.
 *
 * Memory safety: no argument is trusted. Sizes, item sizes and layout of all buffers, and all draws, are checked before the
 * first byte is written; a record's length and codec are checked when it is reached. Row functions read and write exactly
 * their bytes (_rows.h). The buffers are held while the work runs without the GIL; `draws` must be memory that no other
 * process can write, or it could change after the check. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "_rows.h"

enum {
    MAX_SIDE = 1024,         /* types.MAX_SIDE_PX: largest side of a record, in pixels of 3 bytes */
    HEADER_BYTES = 16,       /* codecs.HEADER, little endian: u32 label, u8 codec, 3 bytes of padding, u64 checksum */
    CODEC_RAW = 0,
    CACHE_LINE = 64,         /* bytes */

    /* Rows that are prefetched ahead. A crop's rows are too short, and on too many pages, for the hardware prefetcher.
     * Measured: 5 % more samples each for source and destination; 4 to 16 rows are equally fast. */
    SOURCE_AHEAD = 8,
    OUT_AHEAD = 4,
};

/* types.DRAWS */
typedef struct {
    int16_t y, x;
    uint8_t flip, padding;
    int16_t shift[3];
} Draw;
_Static_assert(sizeof(Draw) == 12, "types.DRAWS has items of 12 bytes");

/* Source and destination of one sample. */
typedef struct {
    const uint8_t *from;     /* the crop's first pixel in its record */
    const uint8_t *next;     /* that of the next sample: only prefetched, so it need not be readable */
    void *out;               /* side x side x 3 of uint8, or of float or float16 with a mean */
    ptrdiff_t item;          /* bytes of one output item: 1, 2 or 4 */
    const float *mean;       /* the mean's window in the sample's orientation, rows of `row` floats; NULL for uint8 */
    ptrdiff_t side;
    ptrdiff_t row;           /* bytes in a row of the record */
    int mirrored;
    Shift shift;
} Sample;

typedef void Row(uint8_t *out, const uint8_t *in, ptrdiff_t n, int mirrored, const Shift *shift);
typedef void Halves(uint16_t *out, const uint8_t *pixels, const float *mean, ptrdiff_t n);

/* ---- one sample ---- */

/* Prefetch the source row SOURCE_AHEAD rows ahead into the second-level cache; past the last row, a row of the next sample. */
ALWAYS_INLINE void fetch_source(const Sample *s, ptrdiff_t r)
{
    const ptrdiff_t ahead = r + SOURCE_AHEAD;
    const uint8_t *row = ahead < s->side ? s->from + ahead * s->row : s->next + (ahead - s->side) * s->row;
    for (ptrdiff_t i = 0; i < 3 * s->side; i += CACHE_LINE)
        __builtin_prefetch(row + i, 0, 2);
}

ALWAYS_INLINE void fetch_out(const Sample *s, ptrdiff_t r, ptrdiff_t out_row)
{
    const char *out = (const char *)s->out + (r + OUT_AHEAD) * out_row;
    for (ptrdiff_t i = 0; r + OUT_AHEAD < s->side && i < out_row; i += CACHE_LINE)
        __builtin_prefetch(out + i, 1);
}

ALWAYS_INLINE void make_sample(Row *row, Halves *halves, const Sample *s)
{
    const ptrdiff_t n = 3 * s->side;
    uint8_t pixels[3 * MAX_SIDE];
    for (ptrdiff_t r = 0; r < s->side; r++) {
        fetch_source(s, r);
        fetch_out(s, r, n * s->item);
        const uint8_t *in = s->from + r * s->row;
        if (s->mean == NULL) {
            row((uint8_t *)s->out + r * n, in, n, s->mirrored, &s->shift);
            continue;
        }
        row(pixels, in, n, s->mirrored, &s->shift);
        float *out = (float *)s->out + r * n;
        const float *mean = s->mean + r * s->row;
        if (s->item == sizeof(uint16_t))
            halves((uint16_t *)s->out + r * n, pixels, mean, n);
        else
            for (ptrdiff_t i = 0; i < n; i++)
                out[i] = (float)pixels[i] - mean[i];
    }
}

/* ---- the forms, best first ---- */

static void sample_c(const Sample *s) { make_sample(row_c, halves_c, s); }
static int always(void) { return 1; }

#if defined(VECTORS_X86)
typedef void Stream(uint8_t *out, const uint8_t *in, ptrdiff_t n);

/* 1 if two rows of a sample are whole cache lines: non-temporal stores need that. */
static inline int can_stream(const Sample *s)
{
    return s->mean == NULL && s->side % 2 == 0 && 6 * s->side % CACHE_LINE == 0 && (uintptr_t)s->out % CACHE_LINE == 0;
}

/* make_sample() with non-temporal stores: the destination's lines are not read before they are overwritten, and the
 * records' pages stay in the caches. This process does not read a sample again; a device, a socket or another process
 * does. Measured: 12 % more samples. */
ALWAYS_INLINE void stream_sample(Row *row, Stream *stream, const Sample *s)
{
    const ptrdiff_t n = 3 * s->side;
    uint8_t rows[2 * 3 * MAX_SIDE] __attribute__((aligned(CACHE_LINE)));
    for (ptrdiff_t r = 0; r < s->side; r += 2) {
        for (ptrdiff_t i = 0; i < 2; i++) {
            fetch_source(s, r + i);
            row(rows + i * n, s->from + (r + i) * s->row, n, s->mirrored, &s->shift);
        }
        stream((uint8_t *)s->out + r * n, rows, 2 * n);
    }
}

TARGET_AVX2 static void sample_avx2(const Sample *s) { make_sample(row_avx2, halves_avx2, s); }
static int has_avx2(void) { return __builtin_cpu_supports("avx2") && has_f16c(); }

TARGET_AVX512 static void sample_avx512(const Sample *s)
{
    if (can_stream(s))
        stream_sample(row_avx512, stream_avx512, s);
    else
        make_sample(row_avx512, halves_avx2, s);
}
static int has_avx512(void)
{
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vbmi");
}
#elif defined(VECTORS_ARM)
static void sample_neon(const Sample *s) { make_sample(row_neon, halves_c, s); }
#endif

typedef struct {
    const char *name;
    int (*runs_here)(void);
    void (*sample)(const Sample *);
} Form;

static const Form FORMS[] = {
#if defined(VECTORS_X86)
    {"avx512", has_avx512, sample_avx512},
    {"avx2", has_avx2, sample_avx2},
#elif defined(VECTORS_ARM)
    {"neon", always, sample_neon},
#endif
    {"c", always, sample_c},
};
enum { N_FORMS = sizeof FORMS / sizeof *FORMS };

/* ---- a slice ---- */

typedef struct {
    const Form *form;
    Py_buffer images, draws, labels, numbers, at, mean; /* at and mean: obj is NULL if not given */
    Py_buffer *values;
    Py_ssize_t n, held;      /* number of records; number of values whose buffers are held */
    Py_ssize_t samples;      /* per record */
    ptrdiff_t side;          /* of a crop, in pixels */
    ptrdiff_t record_side;   /* of a record */
} Slice;

static const uint8_t *crop_of(const Slice *s, Py_ssize_t sample)
{
    const Draw *draw = (const Draw *)s->draws.buf + sample;
    return (const uint8_t *)s->values[sample / s->samples].buf + HEADER_BYTES +
           3 * (draw->y * s->record_side + draw->x);
}

static void make_record(const Slice *s, Py_ssize_t record)
{
    const ptrdiff_t image_items = 3 * s->side * s->side;
    for (Py_ssize_t i = record * s->samples; i < (record + 1) * s->samples; i++) {
        const Draw *draw = (const Draw *)s->draws.buf + i;
        Sample sample = {
            .from = crop_of(s, i),
            .next = crop_of(s, i + 1 < s->n * s->samples ? i + 1 : i),
            .out = (char *)s->images.buf + i * image_items * s->images.itemsize,
            .item = s->images.itemsize,
            .side = s->side,
            .row = 3 * s->record_side,
            .mirrored = draw->flip != 0,
        };
        if (s->mean.obj != NULL) { /* mean image and mirror image: a mirrored window starts at the mirrored column */
            ptrdiff_t x = draw->flip ? s->record_side - s->side - draw->x : draw->x;
            ptrdiff_t y = draw->y + (draw->flip ? s->record_side : 0);
            sample.mean = (const float *)s->mean.buf + 3 * (y * s->record_side + x);
        }
        spread(&sample.shift, draw->shift);
        s->form->sample(&sample);
    }
}

/* Make the samples of records until one is not raw; return the number of records made. */
static Py_ssize_t make_slice(const Slice *s)
{
    const Py_ssize_t value_bytes = HEADER_BYTES + 3 * s->record_side * s->record_side;
    for (Py_ssize_t i = 0; i < s->n; i++) {
        if (s->at.obj != NULL) {
            /* Store the number before the first byte is read: a page that cannot be read kills the process here, and the
             * node then names the record. The fence keeps the compiler from moving the store. */
            *(volatile int64_t *)s->at.buf = ((const int64_t *)s->numbers.buf)[i];
            __atomic_signal_fence(__ATOMIC_SEQ_CST);
        }
        const uint8_t *value = s->values[i].buf;
        if (s->values[i].len != value_bytes || value[4] != CODEC_RAW)
            return i;
        ((int64_t *)s->labels.buf)[i] =
            (int64_t)value[0] | (int64_t)value[1] << 8 | (int64_t)value[2] << 16 | (int64_t)value[3] << 24;
        make_record(s, i);
    }
    return s->n;
}

/* ---- what Python passes in ---- */

static int get_array(PyObject *object, Py_buffer *view, const char *name, Py_ssize_t itemsize, Py_ssize_t items, int flags)
{
    if (PyObject_GetBuffer(object, view, PyBUF_ND | flags) < 0)
        return -1;
    if (view->itemsize != itemsize || (items >= 0 && view->len != items * itemsize)) {
        PyErr_Format(PyExc_ValueError, "%s has %zd bytes in items of %zd; needed are %zd items of %zd", name, view->len,
                     view->itemsize, items, itemsize);
        return -1;
    }
    return 0;
}

static int check_draws(const Slice *s)
{
    const Draw *draws = s->draws.buf;
    for (Py_ssize_t i = 0; i < s->n * s->samples; i++) {
        const Draw *d = draws + i;
        int inside = d->y >= 0 && d->x >= 0 && d->y + s->side <= s->record_side && d->x + s->side <= s->record_side;
        int shifts = 1;
        for (int c = 0; c < 3; c++)
            shifts &= d->shift[c] >= -255 && d->shift[c] <= 255;
        if (!inside || !shifts) {
            PyErr_Format(PyExc_ValueError, "draw %zd (y %d, x %d, shift %d %d %d) does not fit a crop of %zd in %zd", i, d->y,
                         d->x, d->shift[0], d->shift[1], d->shift[2], (Py_ssize_t)s->side, (Py_ssize_t)s->record_side);
            return -1;
        }
    }
    return 0;
}

static int get_values(Slice *s, PyObject *values)
{
    s->values = PyMem_Calloc((size_t)s->n + 1, sizeof *s->values);
    if (s->values == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    for (; s->held < s->n; s->held++)
        if (PyObject_GetBuffer(PySequence_Fast_GET_ITEM(values, s->held), &s->values[s->held], PyBUF_SIMPLE) < 0)
            return -1;
    return 0;
}

static int get_images(Slice *s, PyObject *images, int floats)
{
    if (PyObject_GetBuffer(images, &s->images, PyBUF_ND | PyBUF_WRITABLE) < 0)
        return -1;
    const Py_ssize_t item = s->images.itemsize;
    if (floats ? item != 4 && item != 2 : item != 1) {
        PyErr_Format(PyExc_ValueError, "images has items of %zd bytes; needed are 1, or 2 or 4 with a mean", item);
        return -1;
    }
    const Py_ssize_t *shape = s->images.shape + s->images.ndim - 3;
    if ((s->images.ndim != 4 && s->images.ndim != 5) || shape[0] != shape[1] || shape[2] != 3 || shape[0] < 1 ||
        shape[0] > s->record_side || s->images.shape[0] != s->n) {
        PyErr_Format(PyExc_ValueError, "images must be (%zd, side, side, 3) or (%zd, samples, side, side, 3)", s->n, s->n);
        return -1;
    }
    s->side = shape[0];
    s->samples = s->images.ndim == 5 ? s->images.shape[1] : 1;
    return 0;
}

static void release(Slice *s)
{
    Py_buffer *views[] = {&s->images, &s->draws, &s->labels, &s->numbers, &s->at, &s->mean};
    for (size_t i = 0; i < sizeof views / sizeof *views; i++)
        PyBuffer_Release(views[i]);
    while (s->held > 0)
        PyBuffer_Release(&s->values[--s->held]);
    PyMem_Free(s->values);
}

PyDoc_STRVAR(augment_doc, "augment(form, images, values, draws, labels, numbers, at, mean, record_side): see augment.augment_records.");

static PyObject *augment(PyObject *module, PyObject *args)
{
    (void)module;
    const char *name;
    PyObject *images, *values, *draws, *labels, *numbers, *at, *mean;
    Py_ssize_t side;
    if (!PyArg_ParseTuple(args, "sOO!OOOOOn", &name, &images, &PyList_Type, &values, &draws, &labels, &numbers, &at, &mean,
                          &side))
        return NULL;
    if (side < 1 || side > MAX_SIDE)
        return PyErr_Format(PyExc_ValueError, "records are 1 to %d pixels wide, not %zd", MAX_SIDE, side);
    Slice s = {.n = PyList_GET_SIZE(values), .record_side = side};
    for (int i = 0; i < N_FORMS; i++)
        if (strcmp(FORMS[i].name, name) == 0 && FORMS[i].runs_here())
            s.form = &FORMS[i];
    Py_ssize_t made = -1;
    if (s.form == NULL)
        PyErr_Format(PyExc_ValueError, "this machine cannot run the form %s", name);
    else if (get_images(&s, images, mean != Py_None) == 0 &&
             get_array(draws, &s.draws, "draws", sizeof(Draw), s.n * s.samples, 0) == 0 &&
             get_array(labels, &s.labels, "labels", 8, s.n, PyBUF_WRITABLE) == 0 &&
             get_array(numbers, &s.numbers, "numbers", 8, s.n, 0) == 0 &&
             (at == Py_None || get_array(at, &s.at, "at", 8, 1, PyBUF_WRITABLE) == 0) &&
             (mean == Py_None || get_array(mean, &s.mean, "mean", 4, 6 * side * side, 0) == 0) &&
             get_values(&s, values) == 0 && check_draws(&s) == 0) {
        Py_BEGIN_ALLOW_THREADS
        made = make_slice(&s);
        finish_streams();
        Py_END_ALLOW_THREADS
    }
    release(&s);
    return made < 0 ? NULL : PyLong_FromSsize_t(made);
}

/* ---- frames ---- */

/* Copy with non-temporal stores if the CPU can, for the same reasons as stream_sample(). */
static void copy_bytes(uint8_t *out, const uint8_t *in, size_t n)
{
#if defined(VECTORS_X86)
    if (has_avx512() && n >= CACHE_LINE) {
        const size_t head = -(uintptr_t)out % CACHE_LINE, body = (n - head) / CACHE_LINE * CACHE_LINE;
        memcpy(out, in, head);
        stream_avx512(out + head, in + head, (ptrdiff_t)body);
        memcpy(out + head + body, in + head + body, n - head - body);
        finish_streams();
        return;
    }
#endif
    memcpy(out, in, n);
}

PyDoc_STRVAR(copy_doc, "copy(out, content): see kernel.copy.");

static PyObject *copy(PyObject *module, PyObject *args)
{
    (void)module;
    PyObject *out_object, *content_object;
    if (!PyArg_ParseTuple(args, "OO", &out_object, &content_object))
        return NULL;
    Py_buffer out = {0}, content = {0};
    int ready = PyObject_GetBuffer(out_object, &out, PyBUF_WRITABLE) == 0 &&
                PyObject_GetBuffer(content_object, &content, PyBUF_SIMPLE) == 0;
    if (ready && out.len != content.len) {
        PyErr_Format(PyExc_ValueError, "%zd bytes do not fill %zd", content.len, out.len);
        ready = 0;
    }
    if (ready) {
        Py_BEGIN_ALLOW_THREADS
        copy_bytes(out.buf, content.buf, (size_t)out.len);
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&out);
    PyBuffer_Release(&content);
    if (!ready)
        return NULL;
    Py_RETURN_NONE;
}

/* ---- sums ---- */

/* Add a row of n pixels to the sums of pixels, and to the sums of products of channels. */
ALWAYS_INLINE void add_row(const uint8_t *in, ptrdiff_t n, uint16_t *total, int64_t products[9])
{
    int16_t planes[3][MAX_SIDE];
    for (ptrdiff_t i = 0; i < n; i++)
        for (int c = 0; c < 3; c++)
            planes[c][i] = in[3 * i + c];
    for (ptrdiff_t i = 0; i < 3 * n; i++)
        total[i] = (uint16_t)(total[i] + in[i]);
    for (int a = 0; a < 3; a++)
        for (int b = a; b < 3; b++) {
            int32_t sum = 0; /* at most MAX_SIDE * 255 * 255, so 32 bits are enough */
            for (ptrdiff_t i = 0; i < n; i++)
                sum += planes[a][i] * planes[b][i];
            products[3 * a + b] += sum;
            if (b > a)
                products[3 * b + a] += sum;
        }
}

typedef void Add(const uint8_t *in, ptrdiff_t side, uint16_t *total, int64_t products[9]);

ALWAYS_INLINE void add_rows(const uint8_t *in, ptrdiff_t side, uint16_t *total, int64_t products[9])
{
    for (ptrdiff_t y = 0; y < side; y++)
        add_row(in + 3 * side * y, side, total + 3 * side * y, products);
}

static void add_c(const uint8_t *in, ptrdiff_t side, uint16_t *total, int64_t products[9])
{
    add_rows(in, side, total, products);
}

#if defined(VECTORS_X86)
TARGET_AVX2 static void add_avx2(const uint8_t *in, ptrdiff_t side, uint16_t *total, int64_t products[9])
{
    add_rows(in, side, total, products);
}
#endif

static Add *add_of(const char *form)
{
#if defined(VECTORS_X86)
    if ((strcmp(form, "avx512") == 0 || strcmp(form, "avx2") == 0) && has_avx2())
        return add_avx2;
#endif
    return strcmp(form, "c") == 0 || strcmp(form, "neon") == 0 ? add_c : NULL;
}

PyDoc_STRVAR(add_doc, "add(form, pixels, total, products): see kernel.add.");

static PyObject *add(PyObject *module, PyObject *args)
{
    (void)module;
    const char *form;
    PyObject *pixels_object, *total_object, *products_object;
    if (!PyArg_ParseTuple(args, "sOOO", &form, &pixels_object, &total_object, &products_object))
        return NULL;
    Py_buffer pixels = {0}, total = {0}, products = {0};
    Add *const add_pixels = add_of(form);
    int ready = 0;
    if (add_pixels == NULL)
        PyErr_Format(PyExc_ValueError, "this machine cannot run the form %s", form);
    else if (get_array(pixels_object, &pixels, "pixels", 1, -1, 0) == 0) {
        const Py_ssize_t side = pixels.ndim == 3 ? pixels.shape[0] : 0;
        if (side < 1 || side > MAX_SIDE || pixels.shape[1] != side || pixels.shape[2] != 3)
            PyErr_Format(PyExc_ValueError, "pixels must be (side, side, 3), of at most %d", MAX_SIDE);
        else
            ready = get_array(total_object, &total, "total", 2, pixels.len, PyBUF_WRITABLE) == 0 &&
                    get_array(products_object, &products, "products", 8, 9, PyBUF_WRITABLE) == 0;
    }
    if (ready) {
        Py_BEGIN_ALLOW_THREADS
        add_pixels(pixels.buf, pixels.shape[0], total.buf, products.buf);
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&pixels);
    PyBuffer_Release(&total);
    PyBuffer_Release(&products);
    if (!ready)
        return NULL;
    Py_RETURN_NONE;
}

/* ---- the order ---- */

static uint64_t mix(uint64_t half, uint64_t key)
{
    uint64_t z = half + key;
    z = (z ^ z >> 30) * UINT64_C(0xBF58476D1CE4E5B9);
    z = (z ^ z >> 27) * UINT64_C(0x94D049BB133111EB);
    return z >> 32;
}

PyDoc_STRVAR(walk_doc, "walk(out, start, count, keys): see order.records_at.");

static PyObject *walk(PyObject *module, PyObject *args)
{
    (void)module;
    PyObject *out_object, *keys_object;
    unsigned long long start, count;
    if (!PyArg_ParseTuple(args, "OKKO", &out_object, &start, &count, &keys_object))
        return NULL;
    Py_buffer out = {0}, keys = {0};
    int ready = get_array(out_object, &out, "out", 8, -1, PyBUF_WRITABLE) == 0 &&
                get_array(keys_object, &keys, "keys", 8, -1, 0) == 0;
    const uint64_t n = ready ? (uint64_t)out.len / 8 : 0, rounds = ready ? (uint64_t)keys.len / 8 : 0;
    if (ready && (count < 2 || count > UINT64_C(1) << 62 || start > count || n > count - start)) {
        PyErr_Format(PyExc_ValueError, "positions from %llu are not within an epoch of %llu", start, count);
        ready = 0;
    }
    if (ready) {
        const int bits = 64 - __builtin_clzll(count - 1), high_bits = bits / 2, low_bits = bits - high_bits;
        const uint64_t low_mask = (UINT64_C(1) << low_bits) - 1, high_mask = (UINT64_C(1) << high_bits) - 1;
        const uint64_t *key = keys.buf;
        for (uint64_t i = 0; i < n; i++) {
            uint64_t value = start + i;
            do { /* apply the bijection of [0, 2 ** bits) until the value falls below count: twice at most, on average */
                uint64_t low = value & low_mask, high = value >> low_bits;
                for (uint64_t r = 0; r < rounds; r++)
                    if (r % 2 == 0)
                        high ^= mix(low, key[r]) & high_mask;
                    else
                        low ^= mix(high, key[r]) & low_mask;
                value = high << low_bits | low;
            } while (value >= count);
            ((uint64_t *)out.buf)[i] = value;
        }
    }
    PyBuffer_Release(&out);
    PyBuffer_Release(&keys);
    if (!ready)
        return NULL;
    Py_RETURN_NONE;
}

/* ---- the module ---- */

static PyObject *forms(PyObject *module, PyObject *args)
{
    (void)module, (void)args;
    PyObject *names = PyList_New(0);
    for (int i = 0; names != NULL && i < N_FORMS; i++) {
        if (!FORMS[i].runs_here())
            continue;
        PyObject *name = PyUnicode_FromString(FORMS[i].name);
        if (name == NULL || PyList_Append(names, name) < 0)
            Py_CLEAR(names);
        Py_XDECREF(name);
    }
    return names;
}

static PyMethodDef METHODS[] = {
    {"augment", augment, METH_VARARGS, augment_doc},
    {"copy", copy, METH_VARARGS, copy_doc},
    {"add", add, METH_VARARGS, add_doc},
    {"walk", walk, METH_VARARGS, walk_doc},
    {"forms", forms, METH_NOARGS, "forms(): names of the forms that this machine can run, best first."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef MODULE = {PyModuleDef_HEAD_INIT, "_kernel", "See kernel.py.", 0, METHODS, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__kernel(void) { return PyModule_Create(&MODULE); }
