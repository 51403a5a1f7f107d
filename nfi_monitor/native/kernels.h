/* The loops over elements. kernels.c includes this file once for each instruction set, with NAME(x) set.
 *
 * Reductions are marked for the compiler, so that it may add in lanes. Sums of float32 are in double. Nothing
 * here decides about a row: the decisions must not depend on the instruction set.
 */

static inline float NAME(bfloat16)(uint16_t bits)
{
    union { uint32_t u; float f; } as = { (uint32_t)bits << 16 };
    return as.f;
}

static inline float NAME(float16)(uint16_t bits)
{
    /* The product moves the exponent, and makes subnormals normal. Inf and NaN keep their exponent. */
    union { uint32_t u; float f; } as = { (uint32_t)(bits & 0x7fffu) << 13 };
    as.f *= 0x1p112f;
    as.u |= (bits & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0u;
    as.u |= (uint32_t)(bits & 0x8000u) << 16;
    return as.f;
}

#define LOAD(REAL, BITS)                                                                                    \
    static void NAME(load##BITS)(                                                                           \
        REAL *restrict to, const void *restrict from, int dtype, int64_t stride, int64_t n, REAL factor)                      \
    {                                                                                                       \
        if (dtype == NFI_FLOAT32) {                                                                         \
            const float *x = from;                                                                          \
            if (stride == 1)                                                                                \
                for (int64_t i = 0; i < n; i++) to[i] = (REAL)x[i] * factor;                                \
            else                                                                                            \
                for (int64_t i = 0; i < n; i++) to[i] = (REAL)x[i * stride] * factor;                       \
        } else if (dtype == NFI_FLOAT64) {                                                                  \
            const double *x = from;                                                                         \
            for (int64_t i = 0; i < n; i++) to[i] = (REAL)x[i * stride] * factor;                           \
        } else if (dtype == NFI_BFLOAT16) {                                                                 \
            const uint16_t *x = from;                                                                       \
            if (stride == 1)                                                                                \
                for (int64_t i = 0; i < n; i++) to[i] = (REAL)NAME(bfloat16)(x[i]) * factor;                \
            else                                                                                            \
                for (int64_t i = 0; i < n; i++) to[i] = (REAL)NAME(bfloat16)(x[i * stride]) * factor;       \
        } else {                                                                                            \
            const uint16_t *x = from;                                                                       \
            if (stride == 1)                                                                                \
                for (int64_t i = 0; i < n; i++) to[i] = (REAL)NAME(float16)(x[i]) * factor;                 \
            else                                                                                            \
                for (int64_t i = 0; i < n; i++) to[i] = (REAL)NAME(float16)(x[i * stride]) * factor;        \
        }                                                                                                   \
    }

/* Sums are of blocks, and the blocks are added with their rounding errors (Neumaier): a signed sum cancels. */
#define SCAN(REAL, BITS)                                                                                    \
    static nfi_scan NAME(scan##BITS)(const REAL *x, int64_t n)                                              \
    {                                                                                                       \
        double signed_sum = 0.0, absolute = 0.0, rest = 0.0;                                                \
        REAL low = (REAL)INFINITY;                                                                          \
        int nan = 0;                                                                                        \
        for (int64_t from = 0; from < n; from += BLOCK) {                                                   \
            const int64_t end = from + BLOCK < n ? from + BLOCK : n;                                        \
            double s = 0.0, a = 0.0;                                                                        \
            _Pragma("omp simd reduction(+:s, a) reduction(min:low) reduction(|:nan)")                       \
            for (int64_t i = from; i < end; i++) {                                                          \
                const REAL v = x[i];                                                                        \
                s += (double)v;                                                                             \
                a += (double)(v < 0 ? -v : v);                                                              \
                low = v < low ? v : low;                                                                    \
                nan |= v != v;                                                                              \
            }                                                                                               \
            const double both = signed_sum + s;                                                             \
            rest += fabs(signed_sum) >= fabs(s) ? (signed_sum - both) + s : (s - both) + signed_sum;        \
            signed_sum = both;                                                                              \
            absolute += a;                                                                                  \
        }                                                                                                   \
        nfi_scan found = { signed_sum + rest, absolute, (double)low, nan };                                 \
        return found;                                                                                       \
    }

/* The largest of x [n] that is no NaN; -inf if there is none. nan is set if some are. */
#define HIGH(REAL, BITS)                                                                                    \
    static REAL NAME(high##BITS)(const REAL *x, int64_t n, int *nan)                                        \
    {                                                                                                       \
        REAL high = -(REAL)INFINITY;                                                                        \
        int odd = 0;                                                                                        \
        _Pragma("omp simd reduction(max:high) reduction(|:odd)")                                            \
        for (int64_t i = 0; i < n; i++) {                                                                   \
            high = x[i] > high ? x[i] : high;                                                               \
            odd |= x[i] != x[i];                                                                            \
        }                                                                                                   \
        *nan |= odd;                                                                                        \
        return high;                                                                                        \
    }

/* The first place of x [n] with this value, or n - 1; with nan, the first that is NaN. */
#define FIRST(REAL, BITS)                                                                                   \
    static int64_t NAME(first##BITS)(const REAL *x, int64_t n, REAL value, int nan)                         \
    {                                                                                                       \
        int64_t from = 0;                                                                                   \
        for (; !nan && from + 64 <= n; from += 64) {                                                        \
            int found = 0;                                                                                  \
            _Pragma("omp simd reduction(|:found)")                                                          \
            for (int64_t i = from; i < from + 64; i++) found |= x[i] == value;                              \
            if (found) break;                                                                               \
        }                                                                                                   \
        while (from < n - 1 && !(nan ? x[from] != x[from] : x[from] == value)) from++;                      \
        return from;                                                                                        \
    }

LOAD(float, 32)
LOAD(double, 64)
SCAN(float, 32)
SCAN(double, 64)
HIGH(float, 32)
HIGH(double, 64)
FIRST(float, 32)
FIRST(double, 64)

/* e^(x - shift) of count numbers, at most BLOCK, none of them above shift. Below e^-87 (e^-708) it is that.
 * The polynomials are Taylor's on |r| <= ln 2 / 2, cut below an ulp. */
static inline void NAME(exp32)(const float *x, int32_t count, float shift, float *to)
{
    float value[BLOCK], power[BLOCK];
    int32_t bits[BLOCK];
    /* A loop of its own: merged with the next one, compilers make a branch of it, and no vectors. */
#pragma omp simd
    for (int32_t i = 0; i < count; i++) {
        const float d = x[i] - shift;
        power[i] = d < -87.0f ? -87.0f : d;
    }
#pragma omp simd
    for (int32_t i = 0; i < count; i++) {
        const float t = power[i];
        const int32_t e = (int32_t)(t * 1.44269504f - 0.5f);
        const float r = (t - (float)e * 0.693145752f) - (float)e * 1.42860677e-6f;
        float p = 1.98412698e-4f;
        p = p * r + 1.38888889e-3f;
        p = p * r + 8.33333333e-3f;
        p = p * r + 4.16666667e-2f;
        p = p * r + 1.66666667e-1f;
        p = p * r + 0.5f;
        value[i] = (p * r) * r + r + 1.0f;
        bits[i] = (e + 127) << 23; /* the float 2^e */
    }
    memcpy(power, bits, (size_t)count * sizeof(float));
#pragma omp simd
    for (int32_t i = 0; i < count; i++) to[i] = value[i] * power[i];
}

static inline void NAME(exp64)(const double *x, int32_t count, double shift, double *to)
{
    double value[BLOCK], power[BLOCK];
    int64_t bits[BLOCK];
#pragma omp simd
    for (int32_t i = 0; i < count; i++) {
        const double d = x[i] - shift;
        power[i] = d < -708.0 ? -708.0 : d;
    }
#pragma omp simd
    for (int32_t i = 0; i < count; i++) {
        const double t = power[i];
        const int32_t e = (int32_t)(t * 1.4426950408889634 - 0.5);
        const double r = (t - (double)e * 0.693147180369123816490) - (double)e * 1.90821492927058770002e-10;
        double p = 1.0 / 6227020800.0;
        p = p * r + 1.0 / 479001600.0;
        p = p * r + 1.0 / 39916800.0;
        p = p * r + 1.0 / 3628800.0;
        p = p * r + 1.0 / 362880.0;
        p = p * r + 1.0 / 40320.0;
        p = p * r + 1.0 / 5040.0;
        p = p * r + 1.0 / 720.0;
        p = p * r + 1.0 / 120.0;
        p = p * r + 1.0 / 24.0;
        p = p * r + 1.0 / 6.0;
        p = p * r + 0.5;
        value[i] = (p * r) * r + r + 1.0;
        bits[i] = ((int64_t)e + 1023) << 52; /* the double 2^e */
    }
    memcpy(power, bits, (size_t)count * sizeof(double));
#pragma omp simd
    for (int32_t i = 0; i < count; i++) to[i] = value[i] * power[i];
}

/* e^x of x [n], none of them below -708 or above 0, in place. */
static void NAME(exps)(double *x, int64_t n)
{
    double from[BLOCK];
    for (int64_t i = 0; i < n; i += BLOCK) {
        const int32_t count = n - i < BLOCK ? (int32_t)(n - i) : BLOCK;
        memcpy(from, x + i, (size_t)count * sizeof(double));
        NAME(exp64)(from, count, 0.0, x + i);
    }
}

/* below: fill with z - max z, at least lowest; returns max z, and in least the smallest of them, NaN if a logit
 * is NaN. total: the sum of e; share: the products with a number, rounded. */
#define CROSS_ENTROPY(REAL, BITS)                                                                           \
    static double NAME(below##BITS)(const REAL *z, int64_t n, double lowest, double *to, double *least)     \
    {                                                                                                       \
        REAL most = -(REAL)INFINITY, low = (REAL)INFINITY;                                                  \
        int nan = 0;                                                                                        \
        _Pragma("omp simd reduction(max:most) reduction(min:low) reduction(|:nan)")                         \
        for (int64_t i = 0; i < n; i++) {                                                                   \
            const REAL v = z[i];                                                                            \
            most = v > most ? v : most;                                                                     \
            low = v < low ? v : low;                                                                        \
            nan |= v != v;                                                                                  \
        }                                                                                                   \
        _Pragma("omp simd")                                                                                 \
        for (int64_t i = 0; i < n; i++) {                                                                   \
            const double d = (double)z[i] - (double)most;                                                   \
            to[i] = d < lowest ? lowest : d;                                                                \
        }                                                                                                   \
        *least = nan ? NAN : (double)low - (double)most;                                                    \
        return (double)most;                                                                                \
    }                                                                                                       \
                                                                                                            \
    static void NAME(share##BITS)(const double *e, int64_t n, double factor, REAL *to)                      \
    {                                                                                                       \
        _Pragma("omp simd")                                                                                 \
        for (int64_t i = 0; i < n; i++) to[i] = (REAL)(e[i] * factor);                                      \
    }

CROSS_ENTROPY(float, 32)
CROSS_ENTROPY(double, 64)

static double NAME(total)(const double *e, int64_t n)
{
    double sum = 0.0;
#pragma omp simd reduction(+:sum)
    for (int64_t i = 0; i < n; i++) sum += e[i];
    return sum;
}

/* exp_sum: the sum of e^(x - shift), where no x is NaN. fit: the sums of u e, e^2 and u^2, where e = e^(z - shift)
 * and u = factor g. */
#define EXPONENTIALS(REAL, BITS)                                                                            \
    static double NAME(exp_sum##BITS)(const REAL *x, int64_t n, REAL shift)                                 \
    {                                                                                                       \
        double sum = 0.0;                                                                                   \
        REAL e[BLOCK];                                                                                      \
        for (int64_t from = 0; from < n; from += BLOCK) {                                                   \
            const int32_t count = n - from < BLOCK ? (int32_t)(n - from) : BLOCK;                           \
            NAME(exp##BITS)(x + from, count, shift, e);                                                     \
            _Pragma("omp simd reduction(+:sum)")                                                            \
            for (int32_t i = 0; i < count; i++) sum += (double)e[i];                                        \
        }                                                                                                   \
        return sum;                                                                                         \
    }                                                                                                       \
                                                                                                            \
    static void NAME(fit##BITS)(                                                                            \
        const REAL *z, const REAL *g, int64_t n, REAL shift, REAL factor, double *sums)                     \
    {                                                                                                       \
        double both = 0.0, e2 = 0.0, u2 = 0.0;                                                              \
        REAL e[BLOCK];                                                                                      \
        for (int64_t from = 0; from < n; from += BLOCK) {                                                   \
            const int32_t count = n - from < BLOCK ? (int32_t)(n - from) : BLOCK;                           \
            NAME(exp##BITS)(z + from, count, shift, e);                                                     \
            _Pragma("omp simd reduction(+:both, e2, u2)")                                                   \
            for (int32_t i = 0; i < count; i++) {                                                           \
                const double u = (double)(factor * g[from + i]), v = (double)e[i];                          \
                both += u * v;                                                                              \
                e2 += v * v;                                                                                \
                u2 += u * u;                                                                                \
            }                                                                                               \
        }                                                                                                   \
        sums[0] = both;                                                                                     \
        sums[1] = e2;                                                                                       \
        sums[2] = u2;                                                                                       \
    }

EXPONENTIALS(float, 32)
EXPONENTIALS(double, 64)

/* --- one optimizer step ------------------------------------------------------------------------------------ */

/* Add the coordinates of one tensor. Elements are computed in the dtype of the tensors, sums in double. */
#define STEP(REAL, BITS, SQRT)                                                                              \
    static void NAME(step##BITS)(const nfi_step_call *call, int64_t from, int64_t end, nfi_step_sums *sums) \
    {                                                                                                       \
        const REAL *grad = call->grad, *before = call->before, *after = call->after;                        \
        double g2 = 0.0, m2 = 0.0, a2 = 0.0, gm = 0.0;                                                      \
        _Pragma("omp simd reduction(+:g2, m2, a2, gm)")                                                     \
        for (int64_t i = from; i < end; i++) {                                                              \
            const REAL m = after[i] - before[i];                                                            \
            g2 += (double)grad[i] * (double)grad[i];                                                        \
            m2 += (double)m * (double)m;                                                                    \
            a2 += (double)after[i] * (double)after[i];                                                      \
            gm += (double)grad[i] * (double)m;                                                              \
        }                                                                                                   \
        sums->grad += g2;                                                                                   \
        sums->moved += m2;                                                                                  \
        sums->after += a2;                                                                                  \
        sums->along += gm;                                                                                  \
    }                                                                                                       \
                                                                                                            \
    static void NAME(moment##BITS)(                                                                         \
        const nfi_step_call *call, int64_t from, int64_t end, REAL correction, REAL eps,                    \
        nfi_step_sums *sums)                                                                                \
    {                                                                                                       \
        const REAL *grad = call->grad, *moment = call->exp_avg_sq;                                          \
        REAL *preconditioner = call->preconditioner;                                                        \
        const REAL factor = (REAL)1 / correction; /* a division takes as long as a root */                  \
        double ratios = 0.0, roots = 0.0;                                                                   \
        _Pragma("omp simd reduction(+:ratios, roots)")                                                      \
        for (int64_t i = from; i < end; i++) {                                                              \
            const REAL root = SQRT(moment[i] * factor);                                                     \
            const REAL ratio = grad[i] / (root < eps ? eps : root);                                         \
            preconditioner[i] = root + eps;                                                                 \
            ratios += (double)ratio * (double)ratio;                                                        \
            roots += (double)root;                                                                          \
        }                                                                                                   \
        sums->ratios += ratios;                                                                             \
        sums->roots += roots;                                                                               \
    }                                                                                                       \
                                                                                                            \
    static void NAME(pair##BITS)(const nfi_step_call *call, int64_t from, int64_t end, nfi_step_sums *sums) \
    {                                                                                                       \
        const REAL *grad = call->grad, *before = call->before, *old_grad = call->old_grad;                  \
        const REAL *old_before = call->old_before, *preconditioner = call->old_preconditioner;              \
        double sy = 0.0, sps = 0.0, product = 0.0, old = 0.0;                                               \
        _Pragma("omp simd reduction(+:sy, sps, product, old)")                                              \
        for (int64_t i = from; i < end; i++) {                                                              \
            const REAL s = before[i] - old_before[i], y = grad[i] - old_grad[i];                            \
            sy += (double)s * (double)y;                                                                    \
            sps += (double)s * (double)(preconditioner[i] * s);                                             \
            product += (double)grad[i] * (double)old_grad[i];                                               \
            old += (double)old_grad[i] * (double)old_grad[i];                                               \
        }                                                                                                   \
        sums->sy += sy;                                                                                     \
        sums->sps += sps;                                                                                   \
        sums->product += product;                                                                           \
        sums->old += old;                                                                                   \
    }

/* Add a row to the sums of its columns; returns its product with along, and adds its squares and sizes. */
#define COLUMNS(REAL, BITS)                                                                                 \
    static double NAME(columns##BITS)(                                                                      \
        const REAL *restrict row, int64_t n, double *restrict sums, const double *restrict along,           \
        double *squares, double *sizes)                                                                     \
    {                                                                                                       \
        double dot = 0.0, two = 0.0, one = 0.0;                                                             \
        _Pragma("omp simd reduction(+:dot, two, one)")                                                      \
        for (int64_t j = 0; j < n; j++) {                                                                   \
            const double v = (double)row[j];                                                                \
            sums[j] += v;                                                                                   \
            dot += v * along[j];                                                                            \
            two += v * v;                                                                                   \
            one += fabs(v);                                                                                 \
        }                                                                                                   \
        *squares += two;                                                                                    \
        *sizes += one;                                                                                      \
        return dot;                                                                                         \
    }                                                                                                       \
                                                                                                            \
    /* The products of four rows of doubles, stride apart, with one row. */                                \
    static void NAME(four##BITS)(                                                                           \
        const double *restrict a, int64_t stride, const REAL *restrict b, int64_t n, double *restrict out)  \
    {                                                                                                       \
        const double *a1 = a + stride, *a2 = a1 + stride, *a3 = a2 + stride;                                \
        double s0 = 0.0, s1 = 0.0, s2 = 0.0, s3 = 0.0;                                                      \
        _Pragma("omp simd reduction(+:s0, s1, s2, s3)")                                                     \
        for (int64_t j = 0; j < n; j++) {                                                                   \
            const double v = (double)b[j];                                                                  \
            s0 += a[j] * v;                                                                                 \
            s1 += a1[j] * v;                                                                                \
            s2 += a2[j] * v;                                                                                \
            s3 += a3[j] * v;                                                                                \
        }                                                                                                   \
        out[0] = s0, out[1] = s1, out[2] = s2, out[3] = s3;                                                 \
    }                                                                                                       \
                                                                                                            \
    static void NAME(add##BITS)(double *restrict sums, const REAL *restrict row, int64_t n)                 \
    {                                                                                                       \
        for (int64_t j = 0; j < n; j++) sums[j] += (double)row[j];                                          \
    }

STEP(float, 32, sqrtf)
STEP(double, 64, sqrt)
COLUMNS(float, 32)
COLUMNS(double, 64)

static const nfi_kernels NAME(kernels) = {
    NAME(load32), NAME(load64), NAME(scan32), NAME(scan64), NAME(high32), NAME(high64),
    NAME(first32), NAME(first64), NAME(exp_sum32), NAME(exp_sum64), NAME(fit32), NAME(fit64),
    NAME(step32), NAME(step64), NAME(moment32), NAME(moment64), NAME(pair32), NAME(pair64),
    NAME(columns32), NAME(columns64), NAME(four32), NAME(four64), NAME(add32), NAME(add64),
    NAME(exps), NAME(below32), NAME(below64), NAME(share32), NAME(share64), NAME(total),
};

#undef LOAD
#undef SCAN
#undef HIGH
#undef FIRST
#undef EXPONENTIALS
#undef STEP
#undef COLUMNS
#undef CROSS_ENTROPY
