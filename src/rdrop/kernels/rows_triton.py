"""The arithmetic of one position on a GPU: its rows of m passes, BLOCK classes at a time. `triton.py` launches it.

Two paths compute the same quantities, as on CPU (rows_vector.h has the formulas, and the same names); the forward
chooses, the statistics say which.

NEAR (float32, one exp and m - 1 expm1 a class). A single pass over the rows. All are sums under p_1 = softmax(z_1) of
    d_a = (z_a - z_1) - (z_a[k] - z_1[k]),    x_a = expm1(d_a),    f_a = d_a - mean_b d_b
where any class k gives the same results, and a likely one small numbers. As in an online softmax, k is the likeliest
class of pass 1 so far, and the sums move with it.

FAR (float64, three passes over the rows, in small blocks so that its registers do not slow the other path). Where the
above would lose digits: a pass far above pass 1 at some class, or class k an outlier.

One program computes one position, so the grid never changes a bit of the result. Inside the loops no sum crosses
threads: each thread adds the classes it holds, and the PARTIAL sums meet after the last block. A thread holds
neighbors (NEXT) where 16 bytes can be loaded at once, and where rows begin anywhere, classes as far apart as there are
threads.
"""

from typing import NamedTuple

import triton
import triton.language as tl

DETACHED = tl.constexpr(1)  # detached_kl, by its place in DIVERGENCES of operators.py
FROM_FIRST = tl.constexpr(2)  # kl_from_first
IGNORED = tl.constexpr(-1)
INFINITY = tl.constexpr(float("inf"))
NAN = tl.constexpr(float("nan"))
LOWEST = tl.constexpr(-3.4028234663852886e38)
SUM_TOLERANCE = tl.constexpr(0.01)  # of terms.py
MAX_RISE = tl.constexpr(16.0)  # of d_a: where exp(z_1 - base) underflows, at -87, p_a is then below 1e-30


@triton.jit
def rows(
    logits,
    gradient,
    labels,
    probabilities,
    weight,
    total_weight,
    statistics,
    task,
    divergence,
    grad_task,
    grad_divergence,
    label_smoothing,
    classes,
    inner,
    outer_stride,
    inner_stride,
    pass_stride,
    gradient_outer_stride,
    gradient_inner_stride,
    gradient_pass_stride,
    M: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    FORWARD: tl.constexpr,
    BACKWARD: tl.constexpr,
    DENSE: tl.constexpr,
    BLOCK: tl.constexpr,
    FAR_BLOCK: tl.constexpr,
    PARTIAL: tl.constexpr,
    NEXT: tl.constexpr,
):
    """Computes forward, backward or both, for position `program_id(0)`. `gradient` may be the logits themselves.

    The cross-entropy is of a target t over the classes: w ((1 - eps) q + eps / V), where q is 1 at the label or a row
    of `probabilities`. DENSE is whether t is anything but at the label. Its loss is sum t (log Z_a - z_a).

    Strides in elements, from one example, place and pass to the next. `statistics` are 1 + 4 M numbers a position:
    1 if far, and for each pass base, scale, mean F_a and growth X_a (near only), with p_a = scale * exp(z_a - base).
    """
    n = tl.program_id(0).to(tl.int64)
    pass_stride = tl.cast(pass_stride, tl.int64)  # of three passes and more, the last may be 2**31 logits away
    gradient_pass_stride = tl.cast(gradient_pass_stride, tl.int64)
    example = n // inner
    place = n % inner
    row = logits + example * outer_stride + place * inner_stride
    out = gradient + example * gradient_outer_stride + place * gradient_inner_stride
    statistics += n * (1 + 4 * M)
    if probabilities is not None:
        probabilities += n * classes
        label, label_weight = _likeliest_and_total(probabilities, weight, classes, BLOCK, PARTIAL, NEXT)
    else:
        label = tl.load(labels + n)
        label_weight = 1.0

    if (label < 0) | (label >= classes):
        value = tl.where(label == IGNORED, 0.0, NAN)
        if FORWARD:
            tl.store(task + n, value)
            tl.store(divergence + n, 0.0)
            tl.store(statistics, 0.0)
            for a in tl.static_range(M):
                _keep(statistics, a, 0.0, 0.0, 0.0, 0.0)
        if BACKWARD:
            _fill(out, gradient_pass_stride, classes, value, M, BLOCK)
    else:
        all_weight = classes.to(tl.float32)
        if weight is not None:
            all_weight = tl.load(total_weight)
            if probabilities is None:
                label_weight = tl.load(weight + label)
        scale = 1 - label_smoothing
        uniform = label_smoothing / classes
        mass = scale * label_weight + uniform * all_weight
        target = (label, scale * label_weight, mass, probabilities, weight, scale, uniform)
        finite = n >= 0
        if FORWARD:
            near, value, below_label = _near_forward(
                row, pass_stride, target, classes, statistics, M, DIVERGENCE, DENSE, BLOCK, PARTIAL, NEXT
            )
            if not near:
                value = _far_forward(row, pass_stride, classes, statistics, M, DIVERGENCE, FAR_BLOCK)
            tl.debug_barrier()  # every thread sees the statistics in memory
            loss = 0.0
            for a in tl.static_range(M):
                base, p_scale, _, _ = _pass(statistics, a)
                at_label = tl.load(row + a * pass_stride + label).to(tl.float32) - base
                loss += mass * (-tl.log(p_scale) - at_label)  # the logarithm of the sum of exp(z_a - z_a[label])
                if DENSE:
                    loss -= below_label[a]
            loss = loss / M
            tl.store(task + n, loss)
            tl.store(divergence + n, value)
            finite = tl.abs(loss + value) < INFINITY
            if BACKWARD:
                tl.debug_barrier()  # every thread has read its logits before the first is overwritten
        if BACKWARD:
            if finite:
                task_scale = tl.load(grad_task + n) / M
                softmax = task_scale * mass
                pull = 0.0
                if M > 1:
                    pull = tl.load(grad_divergence + n) / (M - 1)
                store = (out, gradient_pass_stride, task_scale, target)
                if pull == 0:
                    _plain_gradient(row, pass_stride, classes, statistics, softmax, store, M, DENSE, BLOCK)
                elif tl.load(statistics) == 0:
                    _near_gradient(
                        row, pass_stride, classes, statistics, softmax, pull, store, M, DIVERGENCE, DENSE, BLOCK
                    )
                else:
                    _far_gradient(
                        row, pass_stride, classes, statistics, softmax, pull, store, M, DIVERGENCE, DENSE, FAR_BLOCK
                    )


# ---------------------------------------------------------------------------------------------- memory


@triton.jit
def _block(row, start, classes, BLOCK: tl.constexpr):
    """Returns BLOCK logits in float32; -inf after the last class."""
    c = start + tl.arange(0, BLOCK)
    return tl.load(row + c, mask=c < classes, other=-INFINITY).to(tl.float32)


@triton.jit
def _from_the_end(done, classes, BLOCK: tl.constexpr):
    """Returns where the next block starts when `done` classes are, the last block first.

    The gradient goes back from where the forward came to: those logits are the ones that a cache still has.
    """
    return (classes - 1) // BLOCK * BLOCK - done


@triton.jit
def _likeliest_and_total(
    probabilities, weight, classes, BLOCK: tl.constexpr, PARTIAL: tl.constexpr, NEXT: tl.constexpr
):
    """Returns the likeliest class q and the sum of w q, NaN where q is no distribution."""
    likeliest = tl.full((), 0, tl.int64)
    highest = tl.full((), -1.0, tl.float32)
    lowest = tl.full((), 0.0, tl.float32)
    total = tl.zeros((PARTIAL,), tl.float32)
    weighted = total
    for start in range(0, classes, BLOCK):
        c = start + tl.arange(0, BLOCK)
        q = tl.load(probabilities + c, mask=c < classes, other=0.0).to(tl.float32)
        top = tl.max(q, 0)
        if top > highest:
            likeliest = (start + tl.argmax(q, 0)).to(tl.int64)
            highest = top
        lowest = tl.minimum(lowest, tl.min(q, 0))
        total += _grouped_sum(q, PARTIAL, NEXT)
        if weight is not None:
            weighted += _grouped_sum(q * tl.load(weight + c, mask=c < classes, other=0.0), PARTIAL, NEXT)
    sums_to = tl.sum(total, 0)
    sound = (lowest >= 0) & (highest <= 1) & (tl.abs(sums_to - 1) <= SUM_TOLERANCE)
    if weight is not None:
        sums_to = tl.sum(weighted, 0)
    return likeliest, tl.where(sound, sums_to, NAN)


@triton.jit
def _share(target, c, classes):
    """Returns t at the classes c, but for what a label has beside it."""
    _, _, _, probabilities, weight, scale, uniform = target
    share = tl.zeros(c.shape, tl.float32) + uniform
    if probabilities is not None:
        share += scale * tl.load(probabilities + c, mask=c < classes, other=0.0).to(tl.float32)
    if weight is not None:
        share *= tl.load(weight + c, mask=c < classes, other=0.0)
    return share


@triton.jit
def _store(store, a: tl.constexpr, gradient, start, classes, DENSE: tl.constexpr, BLOCK: tl.constexpr):
    """Adds what does not depend on the logits, the label's entry included, then rounds once."""
    out, pass_stride, task_scale, target = store
    label, at_label, _, probabilities, _, _, _ = target
    c = start + tl.arange(0, BLOCK)
    if DENSE:
        gradient -= task_scale * _share(target, c, classes)
    if probabilities is None:
        gradient = tl.where(c == label, gradient - task_scale * at_label, gradient)
    tl.store(out + a * pass_stride + c, gradient.to(out.dtype.element_ty), mask=c < classes)


@triton.jit
def _fill(out, pass_stride, classes, value, M: tl.constexpr, BLOCK: tl.constexpr):
    for start in range(0, classes, BLOCK):
        c = start + tl.arange(0, BLOCK)
        for a in tl.static_range(M):
            filled = tl.zeros((BLOCK,), tl.float32) + value
            tl.store(out + a * pass_stride + c, filled.to(out.dtype.element_ty), mask=c < classes)


@triton.jit
def _pass(statistics, a: tl.constexpr):
    """Returns base, scale, mean, growth in float32."""
    at = statistics + 1 + 4 * a
    return (
        tl.load(at).to(tl.float32),
        tl.load(at + 1).to(tl.float32),
        tl.load(at + 2).to(tl.float32),
        tl.load(at + 3).to(tl.float32),
    )


@triton.jit
def _keep(statistics, a: tl.constexpr, base, scale, mean, growth):
    at = statistics + 1 + 4 * a
    tl.store(at, base)
    tl.store(at + 1, scale)
    tl.store(at + 2, mean)
    tl.store(at + 3, growth)


# ---------------------------------------------------------------------------------------------- arithmetic


@triton.jit
def _expm1(x):
    """Returns expm1 within 1e-6 of its value everywhere, without libdevice's branches."""
    series = 1 + x * (1 / 2 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120 + x * (1 / 720)))))
    return tl.where(tl.abs(x) < 0.25, x * series, tl.exp(x) - 1)


@triton.jit
def _beyond_tangent(x):
    """Returns expm1(x) - x within 1e-6 of its value everywhere."""
    series = 1 / 40320 + x * (1 / 362880 + x * (1 / 3628800 + x * (1 / 39916800 + x * (1 / 479001600))))
    series = 1 / 6 + x * (1 / 24 + x * (1 / 120 + x * (1 / 720 + x * (1 / 5040 + x * series))))
    return tl.where(tl.abs(x) < 1, x * x * (1 / 2 + x * series), tl.exp(x) - 1 - x)


@triton.jit
def _log1p(x):
    """Returns log(1 + x) and x less that, each without cancellation, for x > -0.9."""
    series = 1 / 3 - x * (1 / 4 - x * (1 / 5 - x * (1 / 6 - x * (1 / 7 - x * (1 / 8)))))
    beyond = x * x * (1 / 2 - x * series)
    small = tl.abs(x) < 0.05
    wide = x.to(tl.float64)
    logarithm = tl.log(1 + wide)
    return (
        tl.where(small, x - beyond, logarithm.to(tl.float32)),
        tl.where(small, beyond, (wide - logarithm).to(tl.float32)),
    )


@triton.jit
def _two_difference(a, b):
    """Returns high and low with `a - b == high + low`, exactly (Knuth)."""
    high = a - b
    taken = high - a
    return high, (a - (high - taken)) - (b + taken)


@triton.jit
def _difference(z, first, offset_high, offset_low):
    """Returns d_a, correctly rounded but for a couple of units; 0 where both logits are -inf."""
    high, low = _two_difference(z, first)
    d = high - offset_high + (low - offset_low)
    return tl.where((z == -INFINITY) & (first == -INFINITY), 0.0, d)


@triton.jit
def _grouped_sum(x, PARTIAL: tl.constexpr, NEXT: tl.constexpr):
    if NEXT:
        grouped = tl.sum(tl.reshape(x, (PARTIAL, x.shape[0] // PARTIAL)), 1)
    else:
        grouped = tl.sum(tl.reshape(x, (x.shape[0] // PARTIAL, PARTIAL)), 0)
    return grouped


@triton.jit
def _grouped_max(x, PARTIAL: tl.constexpr, NEXT: tl.constexpr):
    if NEXT:
        grouped = tl.max(tl.reshape(x, (PARTIAL, x.shape[0] // PARTIAL)), 1)
    else:
        grouped = tl.max(tl.reshape(x, (x.shape[0] // PARTIAL, PARTIAL)), 0)
    return grouped


# ---------------------------------------------------------------------------------------------- near


class _Sums(NamedTuple):
    """Computes what the near forward knows of one pass a."""

    at: tl.tensor  # z_a[k], exactly: with z_1[k] it gives the same differences again in the backward
    rise: tl.tensor  # the largest d_a
    d: tl.tensor  # sums under p_1, unnormalized: of d_a,
    x: tl.tensor  # x_a,
    second: tl.tensor  # x_a f_a, or x_a - d_a for FROM_FIRST,
    size: tl.tensor  # and of the absolute values that the last came from
    below: tl.tensor  # sum of t (z_a - z_a[label])


@triton.jit
def _near_forward(
    row,
    pass_stride,
    target,
    classes,
    statistics,
    M: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    DENSE: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTIAL: tl.constexpr,
    NEXT: tl.constexpr,
):
    """Whether this path keeps its digits here, the divergence, and for each pass the sum of t (z_a - z_a[label])."""
    label = target[0]
    base = tl.full((), LOWEST, tl.float32)
    zero = base * 0
    none = tl.zeros((PARTIAL,), tl.float32)
    mass = none  # sum of p_1, unnormalized: exp(z_1 - base)
    sums = ()
    for _ in tl.static_range(M):
        sums = sums + (_Sums(base, none - INFINITY, none, none, none, none, none),)

    for start in range(0, classes, BLOCK):
        first = _block(row, start, classes, BLOCK)
        top = tl.max(first, 0)
        if top > base:
            sums = _moved(sums, mass, base, top, row + start + tl.argmax(first, 0), pass_stride, M, DIVERGENCE)
            mass = mass * tl.exp(base - top)
            base = top
        p = tl.exp(first - base)
        mass += _grouped_sum(p, PARTIAL, NEXT)
        zs = (first,)
        ds = (tl.zeros((BLOCK,), tl.float32),)
        d_mean = ds[0]
        for a in tl.static_range(1, M):
            z = _block(row + a * pass_stride, start, classes, BLOCK)
            high, low = _two_difference(sums[a].at, base)
            d = _difference(z, first, high, low)
            d_mean += d / M
            zs = zs + (z,)
            ds = ds + (d,)
        if DENSE:
            c = start + tl.arange(0, BLOCK)
            share = tl.where(c < classes, _share(target, c, classes), 0.0)
        updated = ()
        for a in tl.static_range(M):
            s = sums[a]
            below = s.below
            if DENSE:
                below_label = zs[a] - tl.load(row + a * pass_stride + label).to(tl.float32)
                below += _grouped_sum(tl.where(share == 0, 0.0, share * below_label), PARTIAL, NEXT)
            if a == 0:
                updated = updated + (_Sums(s.at, s.rise, s.d, s.x, s.second, s.size, below),)
            else:
                px = p * _expm1(ds[a])
                if DIVERGENCE == FROM_FIRST:
                    second = _grouped_sum(p * _beyond_tangent(ds[a]), PARTIAL, NEXT)
                else:
                    second = _grouped_sum(px * (ds[a] - d_mean), PARTIAL, NEXT)
                updated = updated + (
                    _Sums(
                        s.at,
                        tl.maximum(s.rise, _grouped_max(ds[a], PARTIAL, NEXT)),
                        s.d + _grouped_sum(p * ds[a], PARTIAL, NEXT),
                        s.x + _grouped_sum(px, PARTIAL, NEXT),
                        s.second + second,
                        s.size + tl.abs(second),
                        below,
                    ),
                )
        sums = updated

    normalizer = tl.sum(mass, 0)
    d_means = ()
    below_label = ()
    d_mean = zero
    for a in tl.static_range(M):
        d_means = d_means + (tl.sum(sums[a].d, 0) / normalizer,)
        below_label = below_label + (tl.sum(sums[a].below, 0),)
        d_mean += d_means[a] / M
    total = zero
    size = zero
    near = base > LOWEST
    if DIVERGENCE == FROM_FIRST:
        _keep(statistics, 0, base, 1 / normalizer, -d_mean * M, zero)
    else:
        _keep(statistics, 0, base, 1 / normalizer, -d_mean, zero)
    for a in tl.static_range(1, M):
        s = sums[a]
        growth = tl.sum(s.x, 0) / normalizer
        second = tl.sum(s.second, 0) / normalizer
        size_a = tl.sum(s.size, 0) / normalizer
        if DIVERGENCE == FROM_FIRST:
            log_growth, beyond = _log1p(growth)
            apart = tl.abs(log_growth) + 2 * tl.log(2 + growth) + tl.abs(d_means[a])  # rows_vector.h says why
            together = size_a < apart
            total += tl.where(together, second - beyond, log_growth - d_means[a])
            size += tl.where(together, size_a, apart)
            mean = zero
        else:
            f = d_means[a] - d_mean
            covariance = (second - growth * f) / (1 + growth)
            total += covariance
            size += size_a / (1 + growth)
            mean = f + covariance
        # Below -0.875, x_a is near -1 in most of p_1, and 1 + growth has lost its digits.
        near = near & (growth >= -0.875) & (tl.max(s.rise, 0) <= MAX_RISE)
        _keep(statistics, a, s.at, 1 / (normalizer * (1 + growth)), mean, growth)
    least = size / 8 if DIVERGENCE == FROM_FIRST else size / 16
    near = near & (total >= least) & (size < INFINITY)  # else class k is an outlier, and the difference canceled
    tl.store(statistics, 0.0)
    if M > 1:
        total = total / (M - 1)
    return near, tl.maximum(total, 0.0), below_label


@triton.jit
def _moved(sums, mass, base, top, at_class, pass_stride, M: tl.constexpr, DIVERGENCE: tl.constexpr):
    """Returns the sums relative to another class k, at `at_class`, where z_1 is `top` instead of `base`.

    With c_a the difference of the two z_a[k] - z_1[k]: d_a falls by c_a, f_a by c_a - mean_b c_b, x_a becomes
    exp(-c_a) x_a + expm1(-c_a), and x_a - d_a becomes exp(-c_a) (x_a - d_a) + expm1(-c_a) d_a + (expm1(-c_a) + c_a).
    """
    shrink = tl.exp(base - top)
    started = base > LOWEST
    offsets = ()
    c_mean = 0.0
    d_mean = mass * 0
    for a in tl.static_range(M):
        at = tl.load(at_class + a * pass_stride).to(tl.float32)
        high, low = _two_difference(at, top)
        old_high, old_low = _two_difference(sums[a].at, base)
        c = tl.where(started, (high - old_high) + (low - old_low), 0.0)
        offsets = offsets + ((at, c),)
        c_mean += c / M
        d_mean += sums[a].d / M
    moved = ()
    for a in tl.static_range(M):
        s = sums[a]
        at, c = offsets[a]
        f_fall = c - c_mean
        f = s.d - d_mean
        kept = shrink * tl.exp(-c)
        new = shrink * _expm1(-c)
        if DIVERGENCE == FROM_FIRST:
            further = shrink * _beyond_tangent(-c) * mass
            second = kept * s.second + new * s.d + further
            size = kept * s.size + tl.abs(new * s.d) + further
        else:
            second = kept * (s.second - f_fall * s.x) + new * (f - f_fall * mass)
            size = kept * (s.size + tl.abs(f_fall * s.x)) + tl.abs(new) * (tl.abs(f) + tl.abs(f_fall) * mass)
        d = shrink * (s.d - c * mass)
        moved = moved + (_Sums(at, s.rise - c, d, kept * s.x + new * mass, second, size, s.below),)
    return moved


@triton.jit
def _near_gradient(
    row,
    pass_stride,
    classes,
    statistics,
    softmax,
    pull,
    store,
    M: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    DENSE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    base, scale, mean, _ = _pass(statistics, 0)
    for done in range(0, classes, BLOCK):
        start = _from_the_end(done, classes, BLOCK)
        first = _block(row, start, classes, BLOCK)
        p = tl.exp(first - base) * scale
        ds = (tl.zeros((BLOCK,), tl.float32),)
        vs = (tl.zeros((BLOCK,), tl.float32),)  # p_a = p_1 (1 + v_a)
        d_mean = ds[0]
        v_mean = vs[0]
        for a in tl.static_range(1, M):
            base_a, _, _, growth = _pass(statistics, a)
            high, low = _two_difference(base_a, base)
            d = _difference(_block(row + a * pass_stride, start, classes, BLOCK), first, high, low)
            v = (_expm1(d) - growth) * (1 / (1 + growth))
            ds = ds + (d,)
            vs = vs + (v,)
            d_mean += d / M
            v_mean += v / M
        if DIVERGENCE == FROM_FIRST:
            of_first = d_mean * M + mean
        elif DIVERGENCE == DETACHED:
            of_first = v_mean
        else:
            of_first = d_mean + mean + v_mean
        _store(store, 0, p * (softmax - pull * of_first), start, classes, DENSE, BLOCK)
        for a in tl.static_range(1, M):
            _, _, mean_a, _ = _pass(statistics, a)
            along = softmax
            apart = vs[a]
            if DIVERGENCE != FROM_FIRST:
                apart = vs[a] - v_mean
                if DIVERGENCE != DETACHED:
                    along = softmax + pull * (ds[a] - d_mean - mean_a)
            _store(store, a, p * (along + (vs[a] * along + pull * apart)), start, classes, DENSE, BLOCK)


# ---------------------------------------------------------------------------------------------- far


@triton.jit
def _far_terms(
    row, pass_stride, start, classes, statistics, M: tl.constexpr, DIVERGENCE: tl.constexpr, BLOCK: tl.constexpr
):
    """Returns for each pass f_a, from t_a = z_a - base_a, and exp(t_a); 0 where every pass is -inf.

    For FROM_FIRST f_a is t_a - t_1, and that of pass 1 less the sum of the others.
    """
    zs = ()
    highest = tl.full((BLOCK,), -INFINITY, tl.float32)
    for a in tl.static_range(M):
        zs = zs + (_block(row + a * pass_stride, start, classes, BLOCK),)
        highest = tl.maximum(highest, zs[a])
    ts = ()
    ps = ()
    t_mean = tl.zeros((BLOCK,), tl.float64)
    for a in tl.static_range(M):
        t = zs[a].to(tl.float64) - tl.load(statistics + 1 + 4 * a)
        ps = ps + (tl.exp(t),)
        ts = ts + (tl.where(highest == -INFINITY, 0.0, t),)
        t_mean += ts[a] / M
    middle = t_mean
    of_first = ts[0] - t_mean
    if DIVERGENCE == FROM_FIRST:
        middle = ts[0]
        of_first = tl.zeros((BLOCK,), tl.float64)
        for a in tl.static_range(1, M):
            of_first -= ts[a] - ts[0]
    fs = (of_first,)
    for a in tl.static_range(1, M):
        fs = fs + (ts[a] - middle,)
    return fs, ps


@triton.jit
def _far_forward(row, pass_stride, classes, statistics, M: tl.constexpr, DIVERGENCE: tl.constexpr, BLOCK: tl.constexpr):
    """Returns the divergence."""
    tl.debug_barrier()  # the near path's statistics are written before these
    for a in tl.static_range(M):
        top = tl.full((BLOCK,), -INFINITY, tl.float32)
        for start in range(0, classes, BLOCK):
            top = tl.maximum(top, _block(row + a * pass_stride, start, classes, BLOCK))
        tl.store(statistics + 1 + 4 * a, tl.max(top, 0).to(tl.float64))
    tl.debug_barrier()
    sums = ()
    for _ in tl.static_range(M):
        sums = sums + ((tl.zeros((BLOCK,), tl.float64), tl.zeros((BLOCK,), tl.float64)),)
    for start in range(0, classes, BLOCK):
        fs, ps = _far_terms(row, pass_stride, start, classes, statistics, M, DIVERGENCE, BLOCK)
        updated = ()
        for a in tl.static_range(M):
            updated = updated + ((sums[a][0] + ps[a], sums[a][1] + ps[a] * fs[a]),)
        sums = updated
    total = tl.zeros((), tl.float64)
    for a in tl.static_range(M):
        normalizer = tl.sum(sums[a][0], 0)
        mean = tl.sum(sums[a][1], 0) / normalizer
        total += mean
        tl.store(statistics + 2 + 4 * a, 1 / normalizer)
        tl.store(statistics + 3 + 4 * a, mean)
    if DIVERGENCE == FROM_FIRST:
        total = _far_kl_from_first(row, pass_stride, classes, statistics, M, BLOCK)
    tl.store(statistics, 1.0)
    if M > 1:
        total = total / (M - 1)
    return tl.where(total < 0, 0.0, total).to(tl.float32)  # a NaN stays


@triton.jit
def _far_kl_from_first(row, pass_stride, classes, statistics, M: tl.constexpr, BLOCK: tl.constexpr):
    """Returns the sum over a of E[expm1(r_a) - r_a] under p_1, with r_a = log(p_a / p_1)."""
    tl.debug_barrier()  # every thread sees the scales in memory
    total = tl.zeros((BLOCK,), tl.float64)
    first_scale = tl.load(statistics + 2)
    for start in range(0, classes, BLOCK):
        fs, es = _far_terms(row, pass_stride, start, classes, statistics, M, FROM_FIRST, BLOCK)
        p = es[0] * first_scale
        for a in tl.static_range(1, M):
            scale = tl.load(statistics + 2 + 4 * a)
            r = fs[a] + tl.log(scale / first_scale)
            series = r * 0 + 1  # Taylor: for |r| < 0.05 the next term is 1e-15 of the first
            for n in tl.static_range(10, 2, -1):
                series = 1 + r * series / n
            total += tl.where(tl.abs(r) < 0.05, p * r * r * series / 2, es[a] * scale - p - p * r)
    return tl.sum(total, 0)


@triton.jit
def _far_gradient(
    row,
    pass_stride,
    classes,
    statistics,
    softmax,
    pull,
    store,
    M: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    DENSE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    for done in range(0, classes, BLOCK):
        start = _from_the_end(done, classes, BLOCK)
        fs, es = _far_terms(row, pass_stride, start, classes, statistics, M, DIVERGENCE, BLOCK)
        ps = ()
        p_mean = tl.zeros((BLOCK,), tl.float64)
        for a in tl.static_range(M):
            ps = ps + (es[a] * tl.load(statistics + 2 + 4 * a),)
            p_mean += ps[a] / M
        if DIVERGENCE == FROM_FIRST:
            p_mean = ps[0]
        for a in tl.static_range(M):
            of_divergence = ps[a] - p_mean
            if DIVERGENCE != DETACHED and (DIVERGENCE != FROM_FIRST or a == 0):
                of_divergence += ps[a] * (fs[a] - tl.load(statistics + 3 + 4 * a))
            gradient = ps[a] * softmax + pull * of_divergence
            _store(store, a, gradient.to(tl.float32), start, classes, DENSE, BLOCK)


# ---------------------------------------------------------------------------------------------- the task loss alone


@triton.jit
def _plain_gradient(
    row, pass_stride, classes, statistics, softmax, store, M: tl.constexpr, DENSE: tl.constexpr, BLOCK: tl.constexpr
):
    for a in tl.static_range(M):
        base, scale, _, _ = _pass(statistics, a)
        for done in range(0, classes, BLOCK):
            start = _from_the_end(done, classes, BLOCK)
            z = _block(row + a * pass_stride, start, classes, BLOCK)
            _store(store, a, tl.exp(z - base) * (scale * softmax), start, classes, DENSE, BLOCK)
