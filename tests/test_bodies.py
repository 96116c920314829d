from __future__ import annotations

import math

import mpmath
import numpy as np
import pytest
import scipy.integrate
import scipy.optimize
import scipy.special
import scipy.stats
import torch
from torch.func import grad, jacrev, vmap

import fastvol
from benchmarks.proofs import bodies, compounds
from benchmarks.proofs.laplace import gaussian_mass_quadratic, log_cdf_from_laplace


def matrix(d: int) -> torch.Tensor:
    normal = np.random.default_rng(d).standard_normal((d, d))
    return torch.eye(d, dtype=torch.float64) + 0.3 * torch.from_numpy(normal)


SMALL = [
    bodies.ball(5, 0.3),
    bodies.ellipsoid(5, 10.0),
    bodies.cube(3),
    bodies.l1_ball(3),
    bodies.simplex(3),
    bodies.star(4, 1.0),
    bodies.rotated_ellipsoid(4, 5.0, seed=3),
    bodies.singular(4, gamma=0.5, level=0.7),
    bodies.lp_ball(3, 4.0, axes=bodies.geometric(3, 1.0, 3.0), rotation_seed=1),
    bodies.lp_ball(3, 4.0, axes=[1.0, 0.5, 2.0]),
    bodies.lp_ball(4, 1.0, rotation_seed=0),
    bodies.lp_ball(3, 0.5),
    bodies.lp_ball(3, 3.0),
    bodies.mixed_powers([0.5, 1.0, 2.0, 3.0, 4.0]),
    bodies.mixed_powers([2.0, 4.0, 6.0]),
    compounds.product([bodies.ball(2), bodies.lp_ball(1, 0.5), bodies.simplex(2)]),
    compounds.product([bodies.star(3, 1.0)]),
    compounds.linear_image(bodies.star(3, 1.0), matrix(3)),
    compounds.shear_image(bodies.cube(5), 1.0),
    compounds.shear_image(bodies.rotated_ellipsoid(4, 3.0), -0.7, seed=2),
    compounds.shear_image(bodies.ball(1), 1.0),
    compounds.polynomial(6),
]
NAMES = [f"{index} {body.name}" for index, body in enumerate(SMALL)]


@pytest.mark.parametrize("body", SMALL, ids=NAMES)
def test_volumes_agree_with_plain_directions(body):
    log_mean, stderr = compounds.plain_reference(body, 100_000, seed=7)
    error = bodies.log_ball(body.dim) + log_mean - body.log_volume
    assert stderr < 0.01
    assert abs(error) < 4.0 * stderr + 1e-9


@pytest.mark.parametrize("body", SMALL, ids=NAMES)
def test_losses_rise_along_rays_and_have_gradients(body):
    points = torch.randn(9, body.dim, dtype=torch.float64)
    points[0] = 0.0
    points[1, 0] = 0.0
    points[2, 1:] = 0.0
    points[3] *= 1e-150
    values, slopes = vmap(body.value)(points), vmap(grad(body.value))(points)
    torch.testing.assert_close(values, torch.stack([body.value(w) for w in points]))
    assert values[0] == 0.0
    assert (values[4:] > 0.0).all()
    assert slopes.isfinite().all()
    # Euler: the derivative along the ray, which is also how far the loss is from homogeneous.
    assert ((slopes[4:] * points[4:]).sum(dim=1) > 0.0).all()

    steps = torch.logspace(-2, 2, 400, dtype=torch.float64)
    along = vmap(body.value)((steps[:, None, None] * points[4:]).reshape(-1, body.dim))
    assert (along.reshape(len(steps), -1).diff(dim=0) > 0.0).all()


def test_models_stand_at_the_origin_and_carry_gradients():
    body = bodies.singular(6)
    model = body.model()
    assert bodies.loss(model) == 0.0
    assert model.w.dtype == torch.float64
    with torch.no_grad():
        model.w.copy_(torch.arange(6.0))
    bodies.loss(model).backward()
    expected = grad(body.value)(torch.arange(6.0, dtype=torch.float64))
    torch.testing.assert_close(model.w.grad, expected)


@pytest.mark.parametrize(
    "body",
    [
        bodies.singular(4, 0.5),
        bodies.mixed_powers([0.5, 2.0]),
        compounds.product([bodies.simplex(2), bodies.lp_ball(2, 4.0)]),
        compounds.shear_image(bodies.ball(4), 1.0),
    ],
    ids=lambda body: body.name,
)
def test_the_public_call_measures_them(body):
    result = fastvol.estimate(body.model(), bodies.loss, n=2000, threshold=1.0, progress=False)
    assert abs(result.log_volume - body.log_volume) < 4.0 * result.stderr
    assert result.stderr < 0.1


@pytest.mark.parametrize("d", [1, 2, 3, 17, 1000, 10**5])
def test_inversion_of_powers(d):
    def log_laplace(s):
        return 0.5 * d * (math.log(math.pi) - np.log(s))

    for level in (1e-20, 1.0, 37.0):
        exact = bodies.log_ball(d) + 0.5 * d * math.log(level)
        assert log_cdf_from_laplace(log_laplace, level) == pytest.approx(exact, rel=1e-14, abs=1e-9)


def test_inversion_refuses_levels_that_cannot_be_reached():
    for level in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="level must be positive and finite"):
            log_cdf_from_laplace(lambda s: -np.log(s), level)
    # Q is at least 2.
    with pytest.raises(ValueError, match=r"level must be above all that Q can fall to, got 1\.5"):
        log_cdf_from_laplace(lambda s: -2.0 * s - np.log1p(s), 1.5)
    exact = math.log(-math.expm1(-0.5))
    assert log_cdf_from_laplace(lambda s: -2.0 * s - np.log1p(s), 2.5) == pytest.approx(exact)


def test_inversion_says_where_it_does_not_converge():
    # A Poisson count: its transform neither decays along a line nor stays small to the left.
    with (
        np.errstate(over="ignore", invalid="ignore"),
        pytest.raises(RuntimeError, match=r"the inversion at level 1\.5 does not converge"),
    ):
        log_cdf_from_laplace(lambda s: np.expm1(-s), 1.5)


@pytest.mark.parametrize("d", [1, 2, 5, 100, 1001])
@pytest.mark.parametrize("fraction", [1e-30, 0.01, 0.5, 0.97, 1.0, 1.2, 4.0, 1e6])
def test_mass_of_a_ball_is_a_chi_square(d, fraction):
    std, curvature = 0.7, 3.0
    found = gaussian_mass_quadratic(np.full(d, curvature), curvature * fraction * d * std**2, std)
    with mpmath.workdps(40):
        half = mpmath.mpf(d) / 2
        mass = mpmath.gammainc(half, 0, half * mpmath.mpf(fraction), regularized=True)
        exact = float(mpmath.log(mass))
    assert found == pytest.approx(exact, rel=1e-13, abs=1e-10)


@pytest.mark.parametrize("d", [1, 2, 20, 1000])
@pytest.mark.parametrize("squared_distance", [0.1, 300.0, 1e4])
def test_mass_of_a_distant_ball_is_a_noncentral_chi_square(d, squared_distance):
    std = 0.2
    offset = torch.full((d,), std * math.sqrt(squared_distance / d), dtype=torch.float64)
    ones = torch.ones(d, dtype=torch.float64)
    for spread in (-4.0, 0.0, 2.0):
        mean, variance = d + squared_distance, 2 * d + 4 * squared_distance
        level = max(0.1 * mean, mean + spread * math.sqrt(variance))
        exact = float(scipy.stats.ncx2.logcdf(level, d, squared_distance))
        found = gaussian_mass_quadratic(ones, level * std**2, std, offset)
        assert found == pytest.approx(exact, rel=1e-9, abs=1e-10)


def log_gamma_cdf(shape: float, x: np.ndarray) -> np.ndarray:
    series = np.log(scipy.special.hyp1f1(1.0, shape + 1.0, x))
    return shape * np.log(x) - x - math.lgamma(shape + 1.0) + series


@pytest.mark.parametrize("level", [1e-3, 5.0, 900.0])
def test_mass_far_in_the_tail_with_two_curvatures(level):
    """500 coordinates of curvature 1 and 500 of 1e6: one integral over the first sum."""
    d, condition = 1000, 1e6
    curvatures = np.repeat([1.0, condition], d // 2)
    nodes, weights = np.polynomial.legendre.leggauss(600)
    x = 0.5 * level * (nodes + 1.0)
    shape = d / 4
    log_density = (shape - 1) * np.log(x / 2) - x / 2 - math.lgamma(shape) - math.log(2.0)
    log_rest = log_gamma_cdf(shape, (level - x) / condition / 2)
    log_weights = np.log(0.5 * level * weights)
    exact = float(scipy.special.logsumexp(log_density + log_rest + log_weights))
    assert exact < -1000.0
    assert gaussian_mass_quadratic(curvatures, level, 1.0) == pytest.approx(exact, abs=1e-8)


def test_mass_of_a_small_body_is_its_volume_times_the_density():
    body = bodies.rotated_ellipsoid(1000, 1e6)
    mean = np.random.default_rng(0).standard_normal(1000)
    level, std = 1e-16, 2.0
    log_volume = body.log_volume + 0.5 * body.dim * math.log(level)
    for offset in (None, mean):
        log_density = -body.dim * (0.5 * math.log(2 * math.pi) + math.log(std))
        if offset is not None:
            log_density -= 0.5 * float(offset @ offset) / std**2
        found = gaussian_mass_quadratic(body.curvatures, level, std, offset)
        assert found == pytest.approx(log_volume + log_density, abs=1e-8)


def test_mass_agrees_with_points_of_the_law():
    curvatures = np.geomspace(1.0, 1e6, 1000)
    generator = np.random.default_rng(1)
    offset = 3.0 * generator.standard_normal(1000) / np.sqrt(1000 * curvatures)
    std = 0.004
    points = offset + std * generator.standard_normal((10_000, 1000))
    sums = points**2 @ curvatures
    for level in np.quantile(sums, [0.02, 0.3, 0.9]):
        mass = math.exp(gaussian_mass_quadratic(curvatures, level, std, offset))
        share = float(np.mean(sums <= level))
        assert abs(share - mass) < 4.0 * math.sqrt(mass * (1 - mass) / len(sums))


def test_mass_refuses_a_curvature_that_is_not_positive():
    with pytest.raises(ValueError, match="curvatures must be positive, got one of -1"):
        gaussian_mass_quadratic(np.array([1.0, -1.0]), 1.0, 1.0)


def test_rotated_ellipsoid_has_the_hessian_that_it_names():
    body = bodies.rotated_ellipsoid(7, 50.0, seed=4)
    assert float(body.curvatures[0]) == 1.0
    assert float(body.curvatures[-1]) == pytest.approx(50.0)
    identity = torch.eye(7, dtype=torch.float64)
    torch.testing.assert_close(body.rotation @ body.rotation.T, identity)
    exact = 2.0 * body.rotation @ torch.diag(body.curvatures) @ body.rotation.T
    for w in (torch.zeros(7, dtype=torch.float64), torch.ones(7, dtype=torch.float64)):
        torch.testing.assert_close(jacrev(grad(body.value))(w), exact)
    again = bodies.rotated_ellipsoid(7, 50.0, seed=4)
    other = bodies.rotated_ellipsoid(7, 50.0, seed=5)
    assert torch.equal(again.rotation, body.rotation)
    assert not torch.allclose(other.rotation, body.rotation, atol=0.1)


def test_quadratics_have_their_hessian_at_the_origin():
    origin = torch.zeros(3, dtype=torch.float64)
    identity = torch.eye(3, dtype=torch.float64)
    torch.testing.assert_close(jacrev(grad(bodies.ball(3, 0.5).value))(origin), 8.0 * identity)
    found = jacrev(grad(bodies.ellipsoid(3, 100.0).value))(origin)
    torch.testing.assert_close(found.diagonal(), 2.0 * bodies.geometric(3, 1.0, 100.0))


def whitened(body: bodies.Ellipsoid, preconditioner: torch.Tensor) -> torch.Tensor:
    hessian = body.rotation @ torch.diag(body.curvatures) @ body.rotation.T
    return torch.linalg.eigvalsh(preconditioner.T @ hessian @ preconditioner)


def test_preconditioners_are_wrong_by_what_they_say():
    body = bodies.rotated_ellipsoid(50, 1e4)
    right = whitened(body, bodies.wrong_preconditioner(body, sd=0.0))
    torch.testing.assert_close(right, torch.ones(50, dtype=torch.float64))
    errors = 0.5 * whitened(body, bodies.wrong_preconditioner(body, sd=0.5, seed=1)).log()
    assert 0.35 < float(errors.std()) < 0.65
    for k in (0, 1, 20, 49):
        found = whitened(body, bodies.top_eigenvectors_preconditioner(body, k))
        rest = body.curvatures[: 50 - k] / body.curvatures[49 - k]
        exact = torch.cat([rest, torch.ones(k, dtype=torch.float64)])
        torch.testing.assert_close(found, exact)
    for k in (-1, 50):
        with pytest.raises(ValueError, match=f"k must be from 0 to 49, got {k}"):
            bodies.top_eigenvectors_preconditioner(body, k)


SHAPES = [(1.0, 1.0), (0.1, 1.0), (0.02, 1.0), (0.001, 1.0), (0.1, 0.01), (30.0, 2.0)]


@pytest.mark.parametrize(("gamma", "level"), SHAPES)
def test_singular_in_two_dimensions_by_quadrature(gamma, level):
    end = math.sqrt(2.0 * level / gamma)

    def height(angle: float) -> float:
        a = end * math.sin(angle)
        # The rest of the level, 0 at the end, written without cancellation.
        rest = level * math.cos(angle) ** 2
        return end * math.cos(angle) * math.sqrt(rest / (a * a + 0.5 * gamma))

    area, _ = scipy.integrate.quad(height, 0.0, 0.5 * math.pi, epsabs=0.0, epsrel=1e-12, limit=200)
    found = bodies.singular(2, gamma, level).log_volume
    assert found == pytest.approx(math.log(4.0 * area), abs=1e-10)


@pytest.mark.parametrize(("gamma", "level"), [(1.0, 1.0), (0.3, 1.0), (0.1, 0.01), (30.0, 2.0)])
def test_singular_in_four_dimensions_by_quadrature(gamma, level):
    """∫ r⁴/4 over the sphere, u = (cos η·(cos α, sin α), sin η·(cos β, sin β))."""
    nodes, weights = np.polynomial.legendre.leggauss(300)
    eta = 0.25 * math.pi * (nodes + 1.0)
    angle = 0.5 * math.pi * (np.arange(100) + 0.5) / 100
    pair = 0.25 * np.sin(2.0 * angle) ** 2
    quartic = (np.cos(eta) ** 4)[:, None, None] * pair[:, None]
    quartic = quartic + (np.sin(eta) ** 4)[:, None, None] * pair
    ridge = 0.5 * gamma
    squared_radius = 2.0 * level / (ridge + np.sqrt(ridge**2 + 4.0 * quartic * level))
    means = (squared_radius**2).mean(axis=(1, 2)) / 4.0
    volume = (2.0 * math.pi) ** 2 * 0.25 * math.pi * (weights * np.cos(eta) * np.sin(eta)) @ means
    found = bodies.singular(4, gamma, level).log_volume
    assert found == pytest.approx(math.log(volume), abs=1e-8)


@pytest.mark.parametrize("gamma", [0.5, 0.02, 0.003])
def test_singular_is_near_its_saddle_point_approximation(gamma):
    d = 1000

    def exponent(log_s: float) -> float:
        s = math.exp(log_s)
        pair = 0.5 * math.log(math.pi / s) + math.log(scipy.special.k0e(s * gamma**2 / 8.0))
        return s + 0.5 * d * pair - log_s

    saddle = scipy.optimize.minimize_scalar(exponent, bracket=(0.0, 10.0)).x
    h = 1e-3
    # In log s, where the second derivative at a stationary point is s² times that in s.
    second = (exponent(saddle + h) - 2.0 * exponent(saddle) + exponent(saddle - h)) / h**2
    approximation = exponent(saddle) + saddle - 0.5 * math.log(2.0 * math.pi * second)
    found = bodies.singular(d, gamma).log_volume
    assert found == pytest.approx(approximation, abs=1e-3)


def test_singular_scales_and_tends_to_a_ball():
    for d in (2, 50, 10_000):
        one, other = bodies.singular(d, 0.02, 1.0), bodies.singular(d, 0.02 * 9.0, 81.0)
        assert other.log_volume - one.log_volume == pytest.approx(d * math.log(3.0), abs=1e-8)
        # Quartic terms are 1e-12 of the level, or less.
        ball = bodies.ball(d, math.sqrt(2.0 / 1e6))
        assert bodies.singular(d, 1e6).log_volume == pytest.approx(ball.log_volume, abs=1e-7)
    with pytest.raises(ValueError, match="d must be even, got 3"):
        bodies.singular(3)


def test_singular_is_hard_for_plain_directions():
    d = 1000
    body = bodies.singular(d)
    generator = np.random.default_rng(0)
    log_weights = []
    for _ in range(10):
        u = generator.standard_normal((1000, d))
        u /= np.linalg.norm(u, axis=1, keepdims=True)
        quartic = ((u[:, 0::2] * u[:, 1::2]) ** 2).sum(axis=1)
        squared_radius = 2.0 / (0.01 + np.sqrt(0.01**2 + 4.0 * quartic))
        log_weights.append(0.5 * d * np.log(squared_radius))
        at_boundary = vmap(body.value)(torch.from_numpy(u[:3] * np.sqrt(squared_radius[:3, None])))
        torch.testing.assert_close(at_boundary, torch.ones(3, dtype=torch.float64))
    log_mean = scipy.special.logsumexp(log_weights) - math.log(10_000)
    assert -100.0 < bodies.log_ball(d) + log_mean - body.log_volume < -50.0


def test_lp_balls_contain_the_known_ones():
    for d in (1, 3, 100):
        for p, same in ((1.0, bodies.l1_ball(d)), (2.0, bodies.ball(d))):
            assert bodies.lp_ball(d, p).log_volume == pytest.approx(same.log_volume, rel=1e-13)
    axes = bodies.geometric(1000, 1.0, 100.0)
    stretched = bodies.lp_ball(1000, 4.0, axes, rotation_seed=0)
    plain = bodies.lp_ball(1000, 4.0)
    assert stretched.log_volume - plain.log_volume == pytest.approx(1000 * math.log(10.0))
    with pytest.raises(ValueError, match=r"axes must have 3 entries, got shape \(2,\)"):
        bodies.lp_ball(3, 4.0, axes=[1.0, 2.0])


def test_powers_and_their_slopes():
    powers = [0.5, 1.0, 2.0, 3.0, 4.0, 2.5]
    x = torch.tensor([-0.3, 0.7, -1.2, 0.4, -0.8, 1.5], dtype=torch.float64)
    p = torch.tensor(powers, dtype=torch.float64)
    value = bodies.power_sum(powers)
    assert float(value(x)) == pytest.approx(float((x.abs() ** p).sum()))
    torch.testing.assert_close(grad(value)(x), p * x.abs() ** (p - 1) * x.sign())
    # At the origin only the square has curvature.
    second = jacrev(grad(value))(torch.zeros_like(x))
    exact = torch.diag(torch.tensor([0.0, 0.0, 2.0, 0.0, 0.0, 0.0], dtype=torch.float64))
    torch.testing.assert_close(second, exact)
    with pytest.raises(ValueError, match="powers must be positive, got 0"):
        bodies.power_sum([1.0, 0.0])


def test_products_and_images():
    parts = [bodies.simplex(3), bodies.lp_ball(2, 0.5), bodies.cube(4)]
    body = compounds.product(parts)
    assert body.dim == 9
    assert body.log_volume == pytest.approx(sum(part.log_volume for part in parts))
    w = torch.randn(9, dtype=torch.float64)
    losses = [parts[0].value(w[:3]), parts[1].value(w[3:5]), parts[2].value(w[5:])]
    assert body.value(w) == max(losses)

    ball, m = bodies.ball(5), matrix(5)
    image = compounds.linear_image(ball, m)
    assert float(image.value(m @ w[:5])) == pytest.approx(float(ball.value(w[:5])))
    with pytest.raises(ValueError, match=r"matrix must be 5 × 5, got \(3, 3\)"):
        compounds.linear_image(ball, matrix(3))
    with pytest.raises(ValueError, match="matrix must be invertible"):
        compounds.linear_image(ball, torch.zeros(5, 5, dtype=torch.float64))


def test_a_shear_bends_and_keeps_rays():
    body = bodies.rotated_ellipsoid(7, 3.0)
    image = compounds.shear_image(body, 0.8)
    w = torch.randn(7, dtype=torch.float64)
    assert float(image.value(3.0 * w)) == pytest.approx(9.0 * float(image.value(w)))
    # No linear image of a symmetric body would tell w from −w.
    assert abs(float(image.value(-w) / image.value(w)) - 1.0) > 0.01
    still = compounds.shear_image(body, 0.0)
    assert float(still.value(w)) == pytest.approx(float(body.value(w)))


def test_polynomial_has_no_scale_and_the_area_of_a_grid():
    body = compounds.polynomial(2)
    w = torch.randn(100, 2, dtype=torch.float64)
    w /= vmap(body.value)(w).sqrt()[:, None]
    power = (vmap(grad(body.value))(w) * w).sum(dim=1) / vmap(body.value)(w)
    assert float(power.max() - power.min()) > 0.2

    side = (torch.arange(1500, dtype=torch.float64) + 0.5) / 750 - 1.0
    grid = 1.5 * torch.cartesian_prod(side, side)
    values = vmap(body.value)(grid)
    assert float(values[(grid.abs() > 1.49).any(dim=1)].min()) > 1.0
    area = 9.0 * float((values <= 1.0).double().mean())
    assert body.log_volume == pytest.approx(math.log(area), abs=1e-3)


def test_plain_reference_refuses_rays_without_end():
    half = bodies.Body("no end", 3, lambda w: 0.5 * w.norm() / (1.0 + w.norm()), math.nan)
    with pytest.raises(RuntimeError, match="L does not cross 1 along 10 of 10 rays"):
        compounds.plain_reference(half, 10)
