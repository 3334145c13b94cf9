/* The limit of copying: a bare memcpy of crops, row by row, from records to a batch. */

#include <stddef.h>
#include <stdint.h>
#include <string.h>

/* from[i]: the first byte of crop i in a record with rows of `stride` bytes; out: n x side rows of `row_bytes`. */
void copy_crops(uint8_t *out, const uint8_t *const *from, size_t n, size_t side, size_t row_bytes, size_t stride)
{
    for (size_t i = 0; i < n; i++)
        for (size_t r = 0; r < side; r++, out += row_bytes)
            memcpy(out, from[i] + r * stride, row_bytes);
}
