"""Parameter groups by rule."""
import re

from mmengine.optim import DefaultOptimWrapperConstructor
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

NORM_LAYERS = (_NormBase, nn.GroupNorm, nn.LayerNorm)


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class RuleOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """Gives each parameter the learning rate and weight decay of the first rule that fits it.

    `paramwise_cfg` is `dict(rules=[...])`. A rule is a dict with

    - `pattern`: a regular expression, searched for in the parameter's name; fits any name if
        missing;
    - `norm`: True to fit only parameters of normalization layers, False to fit only others;
    - `optional`: True if the rule may fit no parameter of the model;
    - `lr_mult`, `decay_mult`: factors of the optimizer's learning rate and weight decay, 1 if
        missing.

    Parameters that no rule fits keep the optimizer's values. There is one group for each pair of
    factors, not one for each parameter, so that the optimizer can update many tensors at once.

    NOTE: mmengine's own constructor looks at `norm_decay_mult` and `bias_decay_mult` only where
    none of its `custom_keys` fits a name, and takes only parameters called exactly `bias` for
    biases; official RT-DETR's groups can't be told to it.

    Raises:
        ValueError: A rule has an unknown entry, or fits no parameter of the model (a slip of the
            pen would silently train with other settings).
    """

    RULE_KEYS = frozenset({'pattern', 'norm', 'lr_mult', 'decay_mult', 'optional'})

    def _validate_cfg(self) -> None:
        super()._validate_cfg()
        unknown = set(self.paramwise_cfg) - {'rules'}
        if unknown:
            raise ValueError(f'{type(self).__name__}: paramwise_cfg has {sorted(unknown)}, '
                             "but takes only 'rules'")
        for rule in self.paramwise_cfg.get('rules', ()):
            unknown = set(rule) - self.RULE_KEYS
            if unknown:
                raise ValueError(f'{type(self).__name__}: rule {dict(rule)} has unknown entries '
                                 f'{sorted(unknown)}; allowed are {sorted(self.RULE_KEYS)}')

    def add_params(self, params: list[dict], module: nn.Module, **kwargs) -> None:
        """Sort the model's trainable parameters into groups.

        Args:
            params: Filled with the optimizer's groups; each has `params`, `lr`, `weight_decay`.
            module: The model.
            kwargs: Not used; stands here for mmengine's signature.
        """
        rules = self.paramwise_cfg.get('rules', ())
        used = [False] * len(rules)
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        seen = set()
        for module_name, owner in module.named_modules():
            is_norm = isinstance(owner, NORM_LAYERS)
            for leaf, parameter in owner.named_parameters(recurse=False):
                name = f'{module_name}.{leaf}' if module_name else leaf
                rule = {}
                for index, candidate in enumerate(rules):
                    if (candidate.get('norm', is_norm) == is_norm
                            and re.search(candidate.get('pattern', ''), name)):
                        used[index] = True
                        rule = candidate
                        break
                if parameter.requires_grad and parameter not in seen:
                    seen.add(parameter)
                    factors = rule.get('lr_mult', 1.), rule.get('decay_mult', 1.)
                    groups.setdefault(factors, []).append(parameter)

        idle = [dict(rule) for rule, fits in zip(rules, used, strict=True)
                if not fits and not rule.get('optional')]
        if idle:
            raise ValueError(f'{type(self).__name__}: no parameter of {type(module).__name__} is '
                             f"left for rule(s) {idle}; correct the pattern, or say optional=True")
        for (lr_mult, decay_mult), members in groups.items():
            group = dict(params=members)
            if self.base_lr is not None:
                group['lr'] = self.base_lr * lr_mult
            if self.base_wd is not None:
                group['weight_decay'] = self.base_wd * decay_mult
            params.append(group)
