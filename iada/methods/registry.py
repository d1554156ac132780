"""All methods by name: a new one is a file beside this, and a line here."""

from iada.methods.afr import AFROptions
from iada.methods.class_balanced import ClassBalancedOptions, FocalOptions
from iada.methods.cmo import CMOOptions
from iada.methods.drw import DeferredReweightingOptions
from iada.methods.groups import GroupDROOptions, UpweightingOptions
from iada.methods.head_loss import CrossEntropyOptions, ISDAOptions, LogitAdjustmentOptions
from iada.methods.ldam import LDAMOptions
from iada.methods.meta_iada import MetaIADAOptions, MetaSAugOptions
from iada.methods.meta_weight_net import MetaWeightNetOptions
from iada.methods.options import MethodOptions
from iada.methods.risda import RISDAOptions

METHODS: dict[str, type[MethodOptions]] = {
    "ce": CrossEntropyOptions,
    "cb-ce": ClassBalancedOptions,
    "cb-focal": FocalOptions,
    "ce-drw": DeferredReweightingOptions,
    "ldam-drw": LDAMOptions,
    "logit-adjustment": LogitAdjustmentOptions,
    "isda": ISDAOptions,
    "metasaug": MetaSAugOptions,
    "risda": RISDAOptions,
    "meta-weight-net": MetaWeightNetOptions,
    "meta-iada": MetaIADAOptions,
    "cmo": CMOOptions,
    "afr": AFROptions,
    "uw": UpweightingOptions,
    "group-dro": GroupDROOptions,
}
