/* Declarations shared by the C files. No torch, no Python: raw pointers and sizes only. */
#ifndef NFI_H
#define NFI_H

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#define NFI_PUBLIC __declspec(dllexport)
#else
#define NFI_PUBLIC __attribute__((visibility("default")))
#endif

/* Version of the functions' arguments: library.py refuses a library of another version. */
#define NFI_VERSION 6

enum nfi_dtype { NFI_FLOAT32, NFI_FLOAT64, NFI_BFLOAT16, NFI_FLOAT16 };

/* What one pass over a row [K] finds. NaN is left out of low, and sets nan. */
typedef struct {
    double sum, absolute;
    double low;
    int nan;
} nfi_scan;

/* One optimizer step over sampled coordinates, packed: those of a tensor lie together. Read: measure/step.py. */
typedef struct {
    const void *grad, *before, *after;  /* [coordinates] */
    const void *exp_avg_sq;             /* [moments], or NULL */
    const void *old_grad, *old_before, *old_preconditioner; /* [moments] of the step before, or NULL */
    void *preconditioner;               /* out [moments] */
    const int64_t *ends;                /* [tensors], where each tensor's coordinates end */
    const double *rates;                /* [tensors], coordinates that one sampled coordinate stands for */
    const double *corrections, *epsilons, *lrs; /* [tensors], or NULL: correction, eps and lr hold for all */
    const unsigned char *matrices;      /* [tensors], whether a tensor has two dimensions or more */
    int64_t tensors, moment_tensors, moments;
    int64_t head;                       /* the head's weight among the tensors, or -1 */
    double total, moment_total;         /* coordinates of all tensors, and of those with a moment */
    double correction, eps, lr;
    double mean_eps;                    /* of the head, or of all tensors */
    int32_t wide;                       /* everything is float64, else float32 */
    /* Where the numbers of a tensor lie that is read whole, in place of after and exp_avg_sq; or NULL. */
    const void *const *after_of, *const *moment_of; /* [tensors], [moment_tensors]; entries may be NULL */
    double out[16];
} nfi_step_call;

enum {
    GRADIENT_NORM, UPDATE_RMS, WEIGHT_NORM, RELATIVE_UPDATE, PREDICTED_REDUCTION, RMS_T_MAX, RMS_T_HEAD,
    ROOT_MEDIAN, ROOT_MEAN, HEAD_ROOT_MEDIAN, HEAD_ROOT_MEAN, EFFECTIVE_RATE, CURVATURE, ALIGNMENT
};

/* Sums over the coordinates of one tensor. */
typedef struct {
    double grad, moved, after, along, ratios, roots, sy, sps, product, old;
} nfi_step_sums;

/* The head around the step. Each matrix has its classes first and its last axis contiguous. */
typedef struct {
    const void *weight;            /* [classes, width], or NULL */
    const void *grad;              /* [classes, columns], or NULL */
    const void *bias_grad;         /* [classes], or NULL */
    const void *update;            /* [kept, width], or NULL: the change of some class rows */
    const void *bias_update;       /* [kept], or NULL */
    const void *features;          /* [rows, width], or NULL */
    const void *mean, *old_mean;   /* [width], or NULL */
    const void *sketch, *old_sketch; /* [sketched, 4], or NULL */
    int64_t weight_stride, grad_stride, update_stride, feature_stride; /* elements from row to row */
    int64_t classes, width, columns, kept, rows, sketched;
    int32_t wide;                  /* everything is float64, else float32 */
    double out[16];
} nfi_head_call;

enum {
    DISPLACEMENT, DISPLACEMENT_RMS, HEAD_NORM, CLASSIFIER_MEAN, MEAN_ALIGNMENT, FEATURE_DISPLACEMENT,
    FEATURE_MEAN, WEIGHT_VIOLATION, BIAS_VIOLATION, ROW_MATCH
};

/* All that nfi_before and nfi_after need to read one optimizer step. What stays from step to step is set once. */
typedef struct {
    nfi_step_call step;            /* grad, before, after and exp_avg_sq are memory to write to */
    nfi_head_call head;            /* grad, bias_grad, update, bias_update and sketch, too. All classes are kept */
    const void *const *params, *const *grads, *const *moments; /* [tensors], contiguous */
    const float *const *taken;     /* [tensors], the number of steps that each moment has averaged */
    const int64_t *strides, *counts; /* [tensors], how each tensor is read */
    const double *betas;           /* [tensors], the decay of each moment */
    double *corrections;           /* out [tensors] */
    const void **after_of, **moment_of; /* out [tensors] */
    const void *old_weight, *old_bias; /* of the head before the step: memory to write to if copy_head */
    const void *bias;              /* of the head, or NULL */
    const void *features;          /* of the sketch [sketched, width], or NULL */
    const double *directions;      /* [4, width] of row_match.py */
    int64_t weight_at, bias_at;    /* the head among the tensors */
    int32_t copy_head;             /* whether the head is not among the coordinates that are read */
} nfi_plan;

/* The loops over elements, compiled once for each instruction set. */
typedef struct {
    void (*load32)(float *to, const void *from, int dtype, int64_t stride, int64_t n, float factor);
    void (*load64)(double *to, const void *from, int dtype, int64_t stride, int64_t n, double factor);
    nfi_scan (*scan32)(const float *x, int64_t n);
    nfi_scan (*scan64)(const double *x, int64_t n);
    float (*high32)(const float *x, int64_t n, int *nan);
    double (*high64)(const double *x, int64_t n, int *nan);
    int64_t (*first32)(const float *x, int64_t n, float value, int nan);
    int64_t (*first64)(const double *x, int64_t n, double value, int nan);
    double (*exp_sum32)(const float *x, int64_t n, float shift);
    double (*exp_sum64)(const double *x, int64_t n, double shift);
    void (*fit32)(const float *z, const float *g, int64_t n, float shift, float factor, double *sums);
    void (*fit64)(const double *z, const double *g, int64_t n, double shift, double factor, double *sums);
    void (*step32)(const nfi_step_call *call, int64_t from, int64_t end, nfi_step_sums *sums);
    void (*step64)(const nfi_step_call *call, int64_t from, int64_t end, nfi_step_sums *sums);
    void (*moment32)(const nfi_step_call *call, int64_t from, int64_t end, float correction, float eps,
                     nfi_step_sums *sums);
    void (*moment64)(const nfi_step_call *call, int64_t from, int64_t end, double correction, double eps,
                     nfi_step_sums *sums);
    void (*pair32)(const nfi_step_call *call, int64_t from, int64_t end, nfi_step_sums *sums);
    void (*pair64)(const nfi_step_call *call, int64_t from, int64_t end, nfi_step_sums *sums);
    double (*columns32)(const float *row, int64_t n, double *sums, const double *along, double *squares,
                        double *sizes);
    double (*columns64)(const double *row, int64_t n, double *sums, const double *along, double *squares,
                        double *sizes);
    void (*four32)(const double *a, int64_t stride, const float *b, int64_t n, double *out);
    void (*four64)(const double *a, int64_t stride, const double *b, int64_t n, double *out);
    void (*add32)(double *sums, const float *row, int64_t n);
    void (*add64)(double *sums, const double *row, int64_t n);
    void (*exps)(double *x, int64_t n);
    double (*below32)(const float *z, int64_t n, double lowest, double *to, double *least);
    double (*below64)(const double *z, int64_t n, double lowest, double *to, double *least);
    void (*share32)(const double *e, int64_t n, double factor, float *to);
    void (*share64)(const double *e, int64_t n, double factor, double *to);
    double (*total)(const double *e, int64_t n);
} nfi_kernels;

/* The kernels in use. Set when the library is loaded, and by nfi_select. */
extern const nfi_kernels *nfi_in_use;

/* The thresholds of logit_scale.py, shift_invariance.py, rows.py, margins.py and cross_entropy_fit.py in
 * measure/. CLEAR is RESOLVED of the last one. */
enum {
    ZERO_SUM, SURE, FEWEST, SAME, STRAIGHT, NEAR, SPREAD, STEEP,
    SAFETY, UNSURE, CLEARLY, RESOLVED, MISMATCH,
    MISCLASSIFIED, VISIBLE, TURNED, LIGHTER, CLEAR, THRESHOLDS
};

/* The facts about the loss: LossKind of measure/loss_kind.py. OTHER is its mismatch. */
enum { EPS, FLOOR, LEVEL, SCALE, SLOPE, OTHER, UNEVEN, FACTS };

enum {
    LIVE, ABSORBED, ABOVE_FLOOR, UNDERFLOWED, SILENT, FINITE,
    UNEXPLAINED, CONTRADICTED, UNSURE_ROWS, SOFT, MEAN_LOGIT,
    VIOLATION, SIGNED, ABSOLUTE, RESIDUAL_MASS,
    HEAD_LOSS, MAX_PROBABILITY,
    ROWS, SAMPLED, MEDIAN_ROWS, COUNTED, RECOMPUTED, SUMS
};
enum { VIOLATION_MAX, NEGATIVE_MARGIN, EPSILON, LOGIT_SCALE, OTHER_MAX, UNEVEN_MAX, MAXIMA };

typedef struct {
    const void *grad, *logits;
    int64_t grad_strides[2], logit_strides[2]; /* elements: rows, classes */
    int64_t rows, classes;
    int64_t total;   /* rows of the whole batch */
    int32_t grad_dtype, logit_dtype;
    int32_t wide;    /* sums are float64: one of both tensors is */
    int32_t look;    /* look at the kind of loss */
    double summation_error; /* measure/zero_sum.py, of the sums' dtype and this number of classes */
    double facts[FACTS];    /* in; with look, SCALE, OTHER and UNEVEN are also out */
    double thresholds[THRESHOLDS];
    void *sums, *maxima;        /* [SUMS], [MAXIMA] of the sums' dtype */
    void *counts, *absorbed;    /* [rows] of the sums' dtype */
    int64_t *winner;            /* [rows] */
} nfi_rows_call;

/* Rows with the features that made them, where all is known to the host: measure/row_plan.py. */
typedef struct {
    nfi_rows_call rows;
    const void *features;           /* [rows, width], or NULL. The last axis is contiguous */
    int64_t width, feature_stride;  /* elements from row to row */
    int64_t keep;                   /* rows of features to copy */
    int32_t feature_wide;           /* the features are float64, else float32 */
    void *feature_sum, *kept;       /* out [width] over the rows that count, [keep, width] */
    double totals[SUMS + MAXIMA];   /* out: rows.sums, then rows.maxima */
} nfi_row_totals_call;

NFI_PUBLIC int nfi_version(void);
NFI_PUBLIC int nfi_select(int level);
NFI_PUBLIC int nfi_rows(nfi_rows_call *call);
NFI_PUBLIC int nfi_row_totals(nfi_row_totals_call *call);
NFI_PUBLIC int nfi_shown(const nfi_rows_call *call);
NFI_PUBLIC double nfi_logit_scale(nfi_rows_call *given);
NFI_PUBLIC int nfi_step(nfi_step_call *call);
NFI_PUBLIC void nfi_gather(const void *const *from, const int64_t *strides, const int64_t *counts, int64_t tensors,
                           int dtype, void *to);
NFI_PUBLIC int nfi_head(nfi_head_call *call);
NFI_PUBLIC int nfi_cross_entropy(const void *logits, const int64_t *target, int64_t rows, int64_t classes, int wide,
                                 void *loss, void *gradient);
NFI_PUBLIC void nfi_before(nfi_plan *plan);
NFI_PUBLIC int nfi_after(nfi_plan *plan);

/* The lower median of those of x [n] that are not NaN, NaN if all are. Reorders x. */
double nfi_median(double *x, int64_t n);

#endif
