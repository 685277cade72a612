"""Hand-written gradients against autograd of the dense formula and against finite differences, in float64.

The formula below is written from arXiv 2504.02922 with a dense code and torch's own differentiation; it shares nothing
with the code under test but the names of the parameters.
"""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from pipeline.numerics.encoder import TrainingEncoder
from pipeline.numerics.gradients import Encoded, Losses, Setting, sparse_gradients
from pipeline.numerics.gradients_dense import Block, dense_gradients, merge_losses
from pipeline.numerics.kernels.choose import choose_kernels
from pipeline.numerics.objective import Objective
from pipeline.numerics.parallel import Mesh
from pipeline.numerics.parameters import Parameters
from pipeline.numerics.sparsities.batch_topk import BatchTopK
from pipeline.numerics.sparsities.jumprelu import JumpRelu
from pipeline.numerics.sparsities.l1 import L1
from pipeline.numerics.spec import CrosscoderSpec
from tests.numerics.small import changed

B, M, D, F = 7, 2, 5, 12
CODE_WEIGHTS = ("crosscoder", "sae", "mixed", "none", "decoupled")


class Case(NamedTuple):
    parameters: Parameters
    x_BN: Tensor


def make_case(num_models: int = M, *, with_threshold: bool = False, dtype: torch.dtype = torch.float64) -> Case:
    generator = torch.Generator().manual_seed(5)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    width = num_models * D
    parameters = Parameters(
        normal(F, width) / 2,
        normal(F) / 4,
        normal(F, width),
        normal(width),
        torch.rand(F, generator=generator, dtype=torch.float64).to(dtype) - 1 if with_threshold else None,
    )
    return Case(parameters, normal(B, width))


def formula(
    parameters: Parameters,
    x_BN: Tensor,
    objective: Objective,
    *,
    num_models: int,
    keep_BFM: Tensor | None,
    aux_BF: Tensor | None = None,
) -> Tensor:
    """The loss with a dense code; keep_BFM and aux_BF say which codes count and carry no gradient."""
    W_enc_FN, b_enc_F, W_dec_FN, b_dec_N, _ = parameters
    x_BMD = x_BN.view(len(x_BN), num_models, -1)
    W_dec_FMD = W_dec_FN.view(len(W_dec_FN), num_models, -1)
    f_BF = torch.relu(x_BN @ W_enc_FN.T + b_enc_F)
    code_BFM = f_BF[:, :, None].expand(-1, -1, num_models)
    if keep_BFM is not None:
        code_BFM = code_BFM * keep_BFM
    residual_BMD = x_BMD - torch.einsum("BFM,FMD->BMD", code_BFM, W_dec_FMD) - b_dec_N.view(num_models, -1)
    norm_BM = residual_BMD.square().sum(2)
    loss = (norm_BM if objective.reconstruction == "mse" else norm_BM.sqrt()).sum() / (objective.num_rows * num_models)
    if isinstance(objective.sparsity, L1):
        norm_FM = W_dec_FMD.norm(dim=2)
        w_F = {
            "crosscoder": norm_FM.sum(1),
            "sae": W_dec_FN.norm(dim=1),
            "mixed": W_dec_FN.norm(dim=1) + 0.1 * norm_FM.sum(1),
            "none": torch.ones(len(W_dec_FN), dtype=x_BN.dtype),
            "decoupled": norm_FM.sum(1),
        }[objective.code_weight]
        loss = loss + objective.penalty * (f_BF * w_F).sum() / objective.num_rows
    if aux_BF is not None:
        target_BMD = residual_BMD.detach()
        gap_BMD = target_BMD - torch.einsum("BF,FMD->BMD", f_BF * aux_BF, W_dec_FMD)
        variation = (target_BMD - target_BMD.mean(0)).square().sum()
        loss = loss + objective.aux_weight * gap_BMD.square().sum() / variation
    return loss


def autograd(case: Case, objective: Objective, **arguments: object) -> tuple[Tensor, list[Tensor]]:
    leaves = Parameters(*(None if part is None else part.clone().requires_grad_() for part in case.parameters))
    loss = formula(leaves, case.x_BN, objective, **arguments)  # type: ignore[arg-type]
    used = [tensor for tensor in leaves[:4] if tensor is not None]
    return loss.detach(), list(torch.autograd.grad(loss, used))


def run_sparse(
    case: Case, encoded: Encoded, objective: Objective, num_models: int, kernels: str
) -> tuple[Tensor, Parameters]:
    out = case.parameters.empty_like()
    setting = Setting(num_models, choose_kernels(torch.device("cpu"), kernels), Mesh())
    losses = sparse_gradients(
        case.parameters, case.x_BN, encoded=encoded, objective=objective, setting=setting, out=out
    )
    return losses.reconstruction + losses.penalty + losses.auxiliary, out


def assert_same(actual: tuple[Tensor, Parameters], expected: tuple[Tensor, list[Tensor]], rtol: float = 1e-9) -> None:
    torch.testing.assert_close(actual[0], expected[0], rtol=rtol, atol=rtol)
    for ours, theirs in zip(actual[1][:4], expected[1], strict=True):
        assert ours is not None
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=rtol * float(theirs.abs().max()))


def make_spec(kind: str, num_models: int = M, **changes: object) -> CrosscoderSpec:
    spec = CrosscoderSpec(
        num_models=num_models,
        activation_dim=D,
        num_latents=F,
        num_steps=10,
        sparsity=BatchTopK(k=3),
        dtype="float64",
        block_rows=4,
    )
    return changed(spec, kind=kind, mu=0.3, **changes)


def encode(case: Case, spec: CrosscoderSpec, dead_F: Tensor | None = None) -> Encoded:
    encoder = TrainingEncoder(spec, choose_kernels(torch.device("cpu")), Mesh(), torch.device("cpu"))
    kept = encoder.select(case.parameters, case.x_BN, k=float(spec.sparsity.k or 0))
    auxiliary = None if dead_F is None else encoder.strongest_dead(case.parameters, case.x_BN, dead_F)
    return Encoded(kept.codes, auxiliary, kept.preact_P)


@pytest.mark.parametrize("kernels", ["reference", "cpu"])
@pytest.mark.parametrize("num_models", [1, 2, 3])
@pytest.mark.parametrize("reconstruction", ["l2", "mse"])
@pytest.mark.parametrize("code_weight", CODE_WEIGHTS)
def test_batch_topk_equals_autograd(code_weight: str, reconstruction: str, num_models: int, kernels: str) -> None:
    case = make_case(num_models)
    spec = make_spec("batch_topk", num_models, code_weight=code_weight)
    encoded = encode(case, spec)
    keep_BFM = torch.zeros(B, F, num_models, dtype=torch.float64)
    codes = encoded.codes
    mask = 1.0 if codes.model_mask_PM is None else codes.model_mask_PM.double()
    keep_BFM[codes.rows_P(), codes.latents_P] = mask  # type: ignore[assignment]
    objective = Objective(spec.sparsity, code_weight, reconstruction, num_rows=B)
    expected = autograd(case, objective, num_models=num_models, keep_BFM=keep_BFM)
    assert_same(run_sparse(case, encoded, objective, num_models, kernels), expected)


@pytest.mark.parametrize("code_weight", ["crosscoder", "decoupled"])
@pytest.mark.parametrize("num_dead", [1, 4, 9])
def test_auxiliary_loss_equals_autograd_and_reaches_the_encoder(num_dead: int, code_weight: str) -> None:
    case = make_case()
    spec = make_spec("batch_topk", code_weight=code_weight, aux_k=3)
    dead_F = torch.arange(F)[-num_dead:]
    encoded = encode(case, spec, dead_F)
    assert encoded.auxiliary is not None
    keep_BFM = torch.zeros(B, F, M, dtype=torch.float64)
    codes = encoded.codes
    mask = 1.0 if codes.model_mask_PM is None else codes.model_mask_PM.double()
    keep_BFM[codes.rows_P(), codes.latents_P] = mask  # type: ignore[assignment]
    aux_BF = (encoded.auxiliary.to_dense() > 0).double()
    assert int(aux_BF.sum(1).max()) <= min(3, num_dead)
    assert not bool(aux_BF[:, : F - num_dead].any())
    objective = Objective(spec.sparsity, code_weight, "l2", num_rows=B, aux_weight=1 / 32)
    expected = autograd(case, objective, num_models=M, keep_BFM=keep_BFM, aux_BF=aux_BF)
    assert_same(run_sparse(case, encoded, objective, M, "cpu"), expected)
    without = run_sparse(case, encoded._replace(auxiliary=None), objective._replace(aux_weight=0), M, "cpu")
    with_auxiliary = run_sparse(case, encoded, objective, M, "cpu")
    assert float((with_auxiliary[1].W_enc_FN - without[1].W_enc_FN)[dead_F].abs().max()) > 1e-6


def run_dense(case: Case, objective: Objective, spec: CrosscoderSpec) -> tuple[Tensor, Parameters]:
    out = case.parameters.empty_like()
    encoder = TrainingEncoder(spec, choose_kernels(torch.device("cpu")), Mesh(), torch.device("cpu"))
    setting = Setting(spec.num_models, choose_kernels(torch.device("cpu")), Mesh())
    parts: list[Losses] = []
    for x_BN, preact_BF in encoder.blocks(case.parameters, case.x_BN):
        block = Block(preact_BF, encoder.scratch(preact_BF), is_first=not parts)
        parts.append(dense_gradients(case.parameters, x_BN, block=block, objective=objective, setting=setting, out=out))
    losses = merge_losses(parts)
    return losses.reconstruction + losses.penalty, out


@pytest.mark.parametrize("reconstruction", ["l2", "mse"])
@pytest.mark.parametrize("num_models", [1, 2, 3])
@pytest.mark.parametrize("code_weight", CODE_WEIGHTS)
def test_l1_equals_autograd_on_both_paths(code_weight: str, num_models: int, reconstruction: str) -> None:
    case = make_case(num_models)
    spec = make_spec("l1", num_models, code_weight=code_weight)
    objective = Objective(spec.sparsity, code_weight, reconstruction, num_rows=B, penalty=0.3)
    expected = autograd(case, objective, num_models=num_models, keep_BFM=None)
    assert_same(run_sparse(case, encode(case, spec), objective, num_models, "cpu"), expected)
    assert_same(run_dense(case, objective, spec), expected)


def test_jumprelu_follows_its_straight_through_formula_on_both_paths() -> None:
    case = make_case(with_threshold=True)
    spec = make_spec("jumprelu", bandwidth=0.5)
    objective = Objective(JumpRelu(bandwidth=0.5), "crosscoder", "l2", num_rows=B, penalty=0.3)
    parameters = case.parameters
    assert parameters.log_threshold_F is not None
    theta_F = parameters.log_threshold_F.exp()
    preact_BF = case.x_BN @ parameters.W_enc_FN.T + parameters.b_enc_F
    active_BF = (preact_BF > theta_F).double()
    loss, gradients = autograd(case, objective, num_models=M, keep_BFM=active_BF[:, :, None].expand(-1, -1, M))
    expected = (loss + 0.3 * active_BF.sum() / B, gradients)
    residual = case.x_BN - (preact_BF * active_BF) @ parameters.W_dec_FN - parameters.b_dec_N
    unit = torch.nn.functional.normalize(residual.view(B, M, D), dim=2).flatten(1)
    grad_f_BF = -unit @ parameters.W_dec_FN.T / (B * M)
    width_F = 0.5 * theta_F
    near_BF = (preact_BF - theta_F).abs() < width_F / 2
    grad_theta_F = -((theta_F * grad_f_BF + 0.3 / B) * near_BF).sum(0) / width_F
    for actual in (run_sparse(case, encode(case, spec), objective, M, "cpu"), run_dense(case, objective, spec)):
        assert_same(actual, expected)
        torch.testing.assert_close(actual[1].log_threshold_F, grad_theta_F * theta_F)


@pytest.mark.parametrize("kind", ["l1", "batch_topk", "topk"])
@pytest.mark.parametrize("reconstruction", ["l2", "mse"])
@pytest.mark.parametrize("code_weight", CODE_WEIGHTS)
def test_gradients_equal_finite_differences(kind: str, reconstruction: str, code_weight: str) -> None:
    case = make_case()
    spec = make_spec(kind, code_weight=code_weight)
    objective = Objective(spec.sparsity, code_weight, reconstruction, num_rows=B, penalty=0.3)
    loss, gradients = run_sparse(case, encode(case, spec), objective, M, "cpu")
    assert float(loss) > 0
    generator = torch.Generator().manual_seed(0)
    step = 1e-6
    for place in range(4):
        tensor, gradient = case.parameters[place], gradients[place]
        assert tensor is not None and gradient is not None
        direction = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        values = []
        for sign in (1, -1):
            moved = Case(
                case.parameters._replace(**{Parameters._fields[place]: tensor + sign * step * direction}), case.x_BN
            )
            values.append(run_sparse(moved, encode(moved, spec), objective, M, "cpu")[0])
        numeric = (values[0] - values[1]) / (2 * step)
        torch.testing.assert_close((gradient * direction).sum(), numeric, rtol=2e-5, atol=1e-7)


def test_float32_equals_the_dense_formula_to_1e_5() -> None:
    case = make_case(dtype=torch.float32)
    encoded = encode(case, make_spec("batch_topk", dtype="float32"))
    keep_BFM = (encoded.codes.to_dense() > 0).float()[:, :, None].expand(-1, -1, M)
    objective = Objective(BatchTopK(k=3), "crosscoder", "l2", num_rows=B)
    expected = autograd(case, objective, num_models=M, keep_BFM=keep_BFM)
    assert_same(run_sparse(case, encoded, objective, M, "cpu"), expected, rtol=1e-5)


def test_a_perfect_reconstruction_has_gradient_zero() -> None:
    parameters = make_case().parameters
    x_BN = parameters.b_dec_N.expand(B, -1).contiguous()
    silent = parameters._replace(b_enc_F=torch.full((F,), -1e6, dtype=torch.float64))
    case = Case(silent, x_BN)
    objective = Objective(BatchTopK(k=3), "crosscoder", "l2", num_rows=B)
    loss, gradients = run_sparse(case, encode(case, make_spec("batch_topk")), objective, M, "cpu")
    assert float(loss) == 0
    assert all(float(gradient.abs().max()) == 0 for gradient in gradients.tensors())
