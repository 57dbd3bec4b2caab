/* Gather: copy the elements of a strided tensor to one place without gaps, in one pass, in the order that they lie in. */
#ifndef FR_GATHER_H
#define FR_GATHER_H

#include <stdint.h>
#include <string.h>

#define FR_GATHER_DIMS 16

struct fr_gather {
    uint32_t dims, item;            /* the item's size in bytes; 0: nothing to gather */
    int64_t shape[FR_GATHER_DIMS], strides[FR_GATHER_DIMS]; /* strides in bytes, outermost dimension first */
};

/* Plan the copy of a tensor of at least one element. `dense` gets the strides, in elements, that the copy has; where a
 * dimension repeats its elements (a stride of 0), so does the copy's. Returns how many elements are copied. */
static inline uint64_t fr_gather_plan(struct fr_gather *plan, uint32_t item, int dims, const int64_t *shape,
                                      const int64_t *strides, int64_t *dense)
{
    int order[FR_GATHER_DIMS], count = 0;
    int64_t elements = 1;
    for (int dim = 0; dim < dims; dim++) { /* by falling stride; those of one stride in the order of the tensor */
        int at = count;
        dense[dim] = shape[dim] == 1;
        if (shape[dim] == 1 || strides[dim] == 0)
            continue;
        for (; at > 0 && strides[order[at - 1]] < strides[dim]; at--)
            order[at] = order[at - 1];
        order[at] = dim;
        count++;
    }
    for (int i = count; i-- > 0;) {
        dense[order[i]] = elements;
        elements *= shape[order[i]];
    }
    plan->dims = 0;
    plan->item = item;
    for (int i = 0; i < count; i++) {
        int64_t size = shape[order[i]], stride = strides[order[i]] * item;
        if (plan->dims && plan->strides[plan->dims - 1] == size * stride) { /* two dimensions that are one */
            plan->shape[plan->dims - 1] *= size;
            plan->strides[plan->dims - 1] = stride;
        } else {
            plan->shape[plan->dims] = size;
            plan->strides[plan->dims++] = stride;
        }
    }
    return (uint64_t)elements;
}

static inline char *fr_gather_row(char *to, const char *from, int64_t count, int64_t stride, uint32_t item)
{
    if (stride == item) {
        memcpy(to, from, (size_t)count * item);
        return to + count * item;
    }
#define FR_GATHER_ITEMS(size)                                                 \
    case size:                                                                \
        for (; count > 0; count--, to += size, from += stride)                \
            memcpy(to, from, size);                                           \
        break
    switch (item) {
        FR_GATHER_ITEMS(1);
        FR_GATHER_ITEMS(2);
        FR_GATHER_ITEMS(4);
        FR_GATHER_ITEMS(8);
        FR_GATHER_ITEMS(16);
    }
#undef FR_GATHER_ITEMS
    return to;
}

/* Copy what was planned from `from` on. Returns where the copy ends. */
static inline char *fr_gather_copy(const struct fr_gather *plan, uint32_t dim, char *to, const char *from)
{
    if (plan->dims == 0) {
        memcpy(to, from, plan->item);
        return to + plan->item;
    }
    if (dim + 1 == plan->dims)
        return fr_gather_row(to, from, plan->shape[dim], plan->strides[dim], plan->item);
    for (int64_t i = 0; i < plan->shape[dim]; i++, from += plan->strides[dim])
        to = fr_gather_copy(plan, dim + 1, to, from);
    return to;
}

#endif
