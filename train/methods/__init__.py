"""The methods: each composed of losses and roles, and known to the trainer by its updates alone."""

from .d_opsd import DOPSD, DOPSDConfig
from .decoupled_dmd import DecoupledDMD, DecoupledDMDConfig
from .dp_dmd import DPDMD, DPDMDConfig
from .flow_matching import FlowMatching, FlowMatchingConfig
from .guidance import Guidance, Weights
from .method import Cast, Method, Streams, TrainingBatch
from .turbo_pp import TurboPP, TurboPPConfig

MethodConfig = TurboPPConfig | DPDMDConfig | DOPSDConfig | DecoupledDMDConfig | FlowMatchingConfig
METHODS: dict[type, type[Method]] = {
    TurboPPConfig: TurboPP,
    DPDMDConfig: DPDMD,
    DOPSDConfig: DOPSD,
    DecoupledDMDConfig: DecoupledDMD,
    FlowMatchingConfig: FlowMatching,
}


def method_class(config: MethodConfig) -> type[Method]:
    """The method that a configuration is of."""
    return METHODS[type(config)]


__all__ = [
    "DOPSD",
    "DPDMD",
    "METHODS",
    "Cast",
    "DOPSDConfig",
    "DPDMDConfig",
    "DecoupledDMD",
    "DecoupledDMDConfig",
    "FlowMatching",
    "FlowMatchingConfig",
    "Guidance",
    "Method",
    "MethodConfig",
    "Streams",
    "TrainingBatch",
    "TurboPP",
    "TurboPPConfig",
    "Weights",
    "method_class",
]
