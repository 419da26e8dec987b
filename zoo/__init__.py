"""Real models in their roles, on the fused operators: backbones, the roles of distillation, contexts, the miniature."""

from .adapters import AdapterBase, AdapterView
from .autoencoder import Autoencoder, load_autoencoder
from .backbone import Backbone
from .context import Context
from .context_cache import ContextCache, OnlineContexts
from .discriminator import Discriminator
from .encoders import load_text_encoder, load_vision_encoder
from .fake_score import FakeScore
from .fuse import fuse, is_fused, unfuse
from .loading import load_backbone
from .miniature import miniature
from .sampling import sigma_grid
from .saved_student import load_student
from .student import Student, TwoStepStudent
from .teacher import Teacher
from .text_to_image import TextToImage, load_text_to_image

__all__ = [
    "AdapterBase",
    "AdapterView",
    "Autoencoder",
    "Backbone",
    "Context",
    "ContextCache",
    "Discriminator",
    "FakeScore",
    "OnlineContexts",
    "Student",
    "Teacher",
    "TextToImage",
    "TwoStepStudent",
    "fuse",
    "is_fused",
    "load_autoencoder",
    "load_backbone",
    "load_student",
    "load_text_encoder",
    "load_text_to_image",
    "load_vision_encoder",
    "miniature",
    "sigma_grid",
    "unfuse",
]
