"""Fit scaling laws to a series of runs: isoFLOP minima, power laws, and loss by parameters N and tokens D.

The methods are approaches 2 and 3 of Hoffmann et al. 2022 (Chinchilla). 95 % intervals come from a parametric
bootstrap, which repeats a fit on simulated losses: the fitted losses plus noise. Series with too few runs to
estimate the noise have simpler intervals or none.
"""

import dataclasses

import numpy as np
from scipy import optimize, stats

DRAWS = 400  # bootstrap samples for isoFLOP intervals; the slower fit of a surface uses a quarter
LEVEL = 0.95


@dataclasses.dataclass(frozen=True)
class Point:
    """A trained model: parameters, training tokens, FLOPs, loss in bits per byte, and CORE if measured."""

    name: str
    parameters: float
    tokens: float
    flops: float
    loss: float
    core: float | None = None
    budget: float = 0.0  # requested FLOPs; 0: none were requested


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A fitted value and the bounds of its 95 % interval, which are NaN if there are too few runs."""

    value: float
    low: float = np.nan
    high: float = np.nan

    @classmethod
    def of(cls, value: float, draws: np.ndarray):
        low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]) if len(draws) else (np.nan, np.nan)
        return cls(float(value), float(low), float(high))


@dataclasses.dataclass(frozen=True)
class Minimum:
    """The best model size for a budget of FLOPs: the minimum of a parabola of loss over log parameters.

    inside: whether the size is between the smallest and the largest trained model.
    """

    budget: float
    parabola: np.ndarray  # coefficients of the loss in log N, highest power first
    parameters: float
    tokens: float
    loss: float
    inside: bool


@dataclasses.dataclass(frozen=True)
class IsoFlop:
    """Power laws of the best model for C FLOPs: N ∝ C^a parameters and D ∝ C^b training tokens.

    lines: (slope, intercept) of log N as a linear function of log C, and the same for log D.
    """

    minima: list[Minimum]
    a: Estimate
    b: Estimate
    lines: tuple[np.ndarray, np.ndarray]
    noise: float  # standard deviation of the losses around the parabolas; NaN: not known


@dataclasses.dataclass(frozen=True)
class Surface:
    """The fit loss = E + A/N^alpha + B/D^beta for N parameters and D training tokens.

    a, b: exponents of the best model for C FLOPs according to the fit: N ∝ C^a and D ∝ C^b.
    """

    E: Estimate
    A: Estimate
    alpha: Estimate
    B: Estimate
    beta: Estimate
    a: Estimate
    b: Estimate
    noise: float  # standard deviation of log loss around the fit

    def loss(self, parameters, tokens):
        parts = self.A.value * parameters**-self.alpha.value, self.B.value * tokens**-self.beta.value
        return self.E.value + parts[0] + parts[1]


def power_law(x, y) -> np.ndarray:
    """Fit a line to log y over log x (natural logarithms). Return [slope, intercept]."""
    return np.polyfit(np.log(x), np.log(y), 1)


def slope_of(x, y) -> Estimate:
    """Fit y ∝ x^k. Return k with its 95 % interval by Student's t, which is NaN for fewer than 3 points."""
    line = stats.linregress(np.log(x), np.log(y))
    half = stats.t.ppf((1 + LEVEL) / 2, len(x) - 2) * line.stderr if len(x) > 2 else np.nan
    return Estimate(float(line.slope), float(line.slope - half), float(line.slope + half))


def minimum(budget: float, points: list[Point], losses=None) -> Minimum | None:
    """Fit a parabola to loss over log parameters. Return its minimum, or None if it opens downward.

    points: the models of one budget. losses: losses to fit in place of those of `points`.
    """
    log_n, log_d = np.log([p.parameters for p in points]), np.log([p.tokens for p in points])
    parabola = np.polyfit(log_n, [p.loss for p in points] if losses is None else losses, 2)
    if parabola[0] <= 0:
        return None
    at = -parabola[1] / (2 * parabola[0])
    inside = log_n.min() <= at <= log_n.max()
    tokens = np.polyval(np.polyfit(log_n, log_d, 2 if inside else 1), at)  # a line extrapolates more safely
    return Minimum(budget, parabola, np.exp(at), np.exp(tokens), np.polyval(parabola, at), bool(inside))


def by_budget(points: list[Point]) -> dict[float, list[Point]]:
    """Return {budget in FLOPs: its points, sorted by size} for budgets with at least three points."""
    found: dict[float, list[Point]] = {}
    for point in sorted(points, key=lambda point: point.parameters):
        found.setdefault(point.budget, []).append(point)
    return {budget: found[budget] for budget in sorted(found) if budget and len(found[budget]) >= 3}


def iso_flop(points: list[Point]) -> IsoFlop | None:
    """Fit power laws to the best model of each budget. Return None if fewer than two have a minimum.

    The 95 % intervals come from the noise around the parabolas if some budget has four models or more, else
    from the residuals of the minima around the power laws.
    """
    found = []  # (minimum, points, losses of the parabola at the points) of each budget
    for budget, of in by_budget(points).items():
        if best := minimum(budget, of):
            found.append((best, of, np.polyval(best.parabola, np.log([p.parameters for p in of]))))
    if len(found) < 2:
        return None
    minima, names = [best for best, *_ in found], ("parameters", "tokens")
    budgets = np.array([best.budget for best in minima])
    lines = tuple(power_law(budgets, [getattr(best, name) for best in minima]) for name in names)
    left = sum(float(np.sum((fitted - [p.loss for p in of]) ** 2)) for _, of, fitted in found)
    free = sum(len(of) - 3 for _, of, _ in found)
    if not free:
        a, b = (slope_of(budgets, [getattr(best, name) for best in minima]) for name in names)
        return IsoFlop(minima, a, b, lines, np.nan)
    noise = np.sqrt(left / free)
    random, slopes = np.random.default_rng(0), []
    for _ in range(DRAWS):
        scale = noise * np.sqrt(free / random.chisquare(free))  # the noise is itself an estimate
        drawn = [
            minimum(best.budget, of, fitted + scale * random.standard_normal(len(of)))
            for best, of, fitted in found
        ]
        if all(drawn):
            slopes.append([power_law(budgets, [getattr(best, name) for best in drawn])[0] for name in names])
    slopes = np.array(slopes).reshape(-1, 2)
    a, b = Estimate.of(lines[0][0], slopes[:, 0]), Estimate.of(lines[1][0], slopes[:, 1])
    return IsoFlop(minima, a, b, lines, float(noise))


def surface(points: list[Point]) -> Surface | None:
    """Fit loss = E + A/N^alpha + B/D^beta to the runs, with N parameters and D training tokens.

    Return None if there are fewer than seven runs or the ratio D : N hardly varies.
    """
    n, d, loss = (np.array([getattr(p, name) for p in points]) for name in ("parameters", "tokens", "loss"))
    if len(points) < 7 or np.std(np.log(n / d)) < 0.1:
        return None
    start = grid_start(n, d, loss)
    best = refined(start, n, d, loss)
    fitted = np.exp(log_loss(best, n, d))
    free = len(points) - len(best)
    noise = np.sqrt(np.sum(np.log(loss / fitted) ** 2) / free)
    random, draws = np.random.default_rng(0), []
    for _ in range(DRAWS // 4):
        scale = noise * np.sqrt(free / random.chisquare(free))
        draws.append(refined(best, n, d, fitted * np.exp(scale * random.standard_normal(len(points)))))

    def constants(p) -> tuple:
        """Convert (log E, log A, alpha, log B, beta) to Surface's (E, A, alpha, B, beta, a, b)."""
        exponents = p[2] + p[4]
        return np.exp(p[0]), np.exp(p[1]), p[2], np.exp(p[3]), p[4], p[4] / exponents, p[2] / exponents

    return Surface(*map(Estimate.of, constants(best), constants(np.array(draws).T)), noise=float(noise))


def log_terms(p, n, d) -> np.ndarray:
    """Return the logarithms of E, A/N^alpha and B/D^beta, the terms of the loss: array [3, points].

    p: (log E, log A, alpha, log B, beta). n, d: parameters N and training tokens D of each point.
    """
    return np.stack([np.full(len(n), p[0]), p[1] - p[2] * np.log(n), p[3] - p[4] * np.log(d)])


def log_loss(p, n, d) -> np.ndarray:
    return np.logaddexp.reduce(log_terms(p, n, d))


def refined(start, n, d, loss) -> np.ndarray:
    """Fit loss = E + A/N^alpha + B/D^beta. Return (log E, log A, alpha, log B, beta), improved from `start`.

    Minimizes the Huber loss of the errors in log loss. n, d: parameters N and tokens D of each point.
    """
    bounds = [-20, -20, 0.0, -20, 0.0], [5, 60, 3.0, 60, 3.0]

    def slopes(p):
        parts = log_terms(p, n, d)
        e, a, b = np.exp(parts - np.logaddexp.reduce(parts))  # fractions of the loss
        return np.stack([e, a, -a * np.log(n), b, -b * np.log(d)], axis=1)

    found = optimize.least_squares(
        lambda p: log_loss(p, n, d) - np.log(loss),
        np.clip(start, *bounds),
        jac=slopes,
        loss="huber",
        f_scale=0.01,
        bounds=bounds,
        x_scale="jac",
    )
    return found.x


def grid_start(n, d, loss) -> np.ndarray:
    """Fit loss = E + A/N^alpha + B/D^beta roughly. Return (log E, log A, alpha, log B, beta).

    For each pair in a grid of alpha and beta, nonnegative least squares gives E, A and B. The best is chosen.
    n, d: parameters N and tokens D of each point.
    """
    best, start = np.inf, None
    for alpha in np.arange(0.1, 1.01, 0.1):
        for beta in np.arange(0.1, 1.01, 0.1):
            columns = np.stack([np.ones(len(n)), (n / n.max()) ** -alpha, (d / d.max()) ** -beta], axis=1)
            parts, left = optimize.nnls(columns, loss)
            if left < best:
                E, A, B = np.log(np.maximum(parts, 1e-6))
                best, start = left, (E, A + alpha * np.log(n.max()), alpha, B + beta * np.log(d.max()), beta)
    return np.array(start)
