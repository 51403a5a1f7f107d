/* Read one optimizer step in two calls, where all tensors are plain and of one dtype: measure/step_plan.py. */
#include "nfi.h"

#include <math.h>
#include <string.h>

static int dtype_of(const nfi_plan *plan) { return plan->step.wide ? NFI_FLOAT64 : NFI_FLOAT32; }

/* Copy the gradients and the weights as they are before the step. */
NFI_PUBLIC void nfi_before(nfi_plan *plan)
{
    const nfi_step_call *step = &plan->step;
    const nfi_head_call *head = &plan->head;
    const size_t size = step->wide ? 8 : 4, weights = (size_t)(head->classes * head->width);
    nfi_gather(plan->grads, plan->strides, plan->counts, step->tensors, dtype_of(plan), (void *)step->grad);
    nfi_gather(plan->params, plan->strides, plan->counts, step->tensors, dtype_of(plan), (void *)step->before);
    if (!plan->copy_head) return;
    memcpy((void *)plan->old_weight, head->weight, weights * size);
    memcpy((void *)head->grad, plan->grads[plan->weight_at], weights * size);
    if (!plan->bias) return;
    memcpy((void *)plan->old_bias, plan->bias, (size_t)head->classes * size);
    memcpy((void *)head->bias_grad, plan->grads[plan->bias_at], (size_t)head->classes * size);
}

/* Read a tensor in place if it is read whole; else copy its coordinates. */
static const void *place_of(const nfi_plan *plan, const void *tensor, int64_t at, const void *packed)
{
    const int64_t from = at ? plan->step.ends[at - 1] : 0;
    if (plan->strides[at] == 1) return tensor;
    nfi_gather(&tensor, &plan->strides[at], &plan->counts[at], 1, dtype_of(plan),
               (char *)packed + from * (plan->step.wide ? 8 : 4));
    return NULL;
}

static void subtract(void *to, const void *a, const void *b, int64_t n, int wide)
{
    if (wide)
        for (int64_t i = 0; i < n; i++) ((double *)to)[i] = ((const double *)a)[i] - ((const double *)b)[i];
    else
        for (int64_t i = 0; i < n; i++) ((float *)to)[i] = ((const float *)a)[i] - ((const float *)b)[i];
}

/* Four numbers of each row of features: row_sketch of measure/row_match.py. */
static void make_sketch(const nfi_plan *plan)
{
    const nfi_head_call *head = &plan->head;
    const int wide = head->wide;
    for (int64_t i = 0; i < head->sketched; i++) {
        const int64_t row = i * head->feature_stride;
        double sums[4];
        if (wide) nfi_in_use->four64(plan->directions, head->width, (const double *)plan->features + row,
                                     head->width, sums);
        else nfi_in_use->four32(plan->directions, head->width, (const float *)plan->features + row, head->width,
                                sums);
        for (int64_t k = 0; k < 4; k++)
            if (wide) ((double *)head->sketch)[4 * i + k] = sums[k];
            else ((float *)head->sketch)[4 * i + k] = (float)sums[k];
    }
}

/* Fill both out. Returns 0, or 1 if there is no memory. */
NFI_PUBLIC int nfi_after(nfi_plan *plan)
{
    nfi_step_call *step = &plan->step;
    for (int64_t i = 0; i < step->tensors; i++) {
        plan->after_of[i] = place_of(plan, plan->params[i], i, step->after);
        plan->moment_of[i] = place_of(plan, plan->moments[i], i, step->exp_avg_sq);
        const double correction = 1.0 - pow(plan->betas[i], (double)*plan->taken[i]);
        plan->corrections[i] = correction < 1e-12 ? 1e-12 : correction;
    }
    step->after_of = plan->after_of;
    step->moment_of = plan->moment_of;
    step->corrections = plan->corrections;
    if (nfi_step(step)) return 1;
    nfi_head_call *head = &plan->head;
    if (head->sketch) make_sketch(plan);
    if (!head->weight) return nfi_head(head);
    subtract((void *)head->update, head->weight, plan->old_weight, head->classes * head->width, head->wide);
    if (plan->bias) subtract((void *)head->bias_update, plan->bias, plan->old_bias, head->classes, head->wide);
    nfi_head_call given = *head;
    if (!head->features) given.update = NULL;
    const int failed = nfi_head(&given);
    memcpy(head->out, given.out, sizeof given.out);
    return failed;
}
