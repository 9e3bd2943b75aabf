"""Paddle's own CPU operators, where they run and are faster than the reference.

rms_norm: Paddle's fused forward has no CPU backward, so it comes with ours; on (2048, 768), forward and backward took 12.5
ms instead of the reference's 20. adamw: one pass over parameter, gradient and both moments instead of a dozen; on 1.6 M
values 3.3 ms instead of 6.4 (two cores of an EPYC with AVX-512, busy with other work).
"""

import paddle
from paddle import _C_ops
from paddle.autograd import PyLayer
from paddle.incubate.nn.functional import fused_rms_norm


def rms_norm(x, weight, epsilon):
    return _RMSNorm.apply(x, weight, epsilon)


class _RMSNorm(PyLayer):
    """y = x r w with r = rsqrt(mean(x^2) + eps): dx = r (dy w - x r^2 mean(dy w x)), dw = sum(dy x r)."""

    @staticmethod
    def forward(ctx, x, weight, epsilon):
        ctx.save_for_backward(x, weight)
        ctx.epsilon, ctx.frozen = epsilon, [x.stop_gradient, weight.stop_gradient]
        y = fused_rms_norm(x, weight, None, epsilon, x.ndim - 1)
        return y[0] if isinstance(y, (tuple, list)) else y

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensor()
        r = paddle.rsqrt((x * x).mean(-1, keepdim=True) + ctx.epsilon)
        g = dy * weight
        gx = g * x
        dx = r * (g - x * (r * r * gx.mean(-1, keepdim=True)))
        dw = None if ctx.frozen[1] else (dy * x * r).reshape([-1, weight.shape[0]]).sum(0)
        return None if ctx.frozen[0] else dx, dw


@paddle.no_grad()
def adamw(parameter, gradient, moment1, moment2, step, lr, beta1, beta2, epsilon, weight_decay, grad_scale=1.0):
    if grad_scale != 1.0:
        gradient = gradient * grad_scale
    _C_ops.adamw_(
        parameter, gradient, paddle.to_tensor(lr, "float32"), moment1, moment2, None,
        paddle.to_tensor([beta1 ** (step - 1) * beta1]), paddle.to_tensor([beta2 ** (step - 1) * beta2]),
        None, None, beta1, beta2, epsilon, 1.0, weight_decay, weight_decay != 0.0, False, 1000, False, False, False,
    )  # fmt: skip
