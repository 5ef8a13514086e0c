"""V-JEPA 2 (arXiv 2506.09985): its features of a clip's pixels, frozen or adapted, and a head that knows the prompt.

Frames are squeezed to the square that the encoder was trained on: cropping would leave the sides unseen.
"""

from __future__ import annotations

from torch import Tensor, nn
from transformers import VJEPA2Model

from afd_train.discriminator_config import VJepa2Config
from afd_train.discriminators import Prompts, Space, evenly_spaced
from afd_train.discriminators.head import PromptedHead
from afd_train.discriminators.pretrained import adapt, check_frames, model_folder, open_model, resized
from afd_train.students import DTYPES

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet
LINEAR = r"layer\.\d+\.(attention\.(query|key|value|proj)|mlp\.fc[12])"


class VJepa2(nn.Module):
    """See `Discriminator`.  `text_dim`: of the student's embedding of prompts."""

    space: Space = "pixels"
    frames: int | None

    def __init__(self, config: VJepa2Config, text_dim: int):
        super().__init__()
        # The predictor guesses the features of hidden patches; nothing is hidden here.
        model = open_model(VJEPA2Model, model_folder(config.path, "vjepa2"), config, unused=("predictor.",))
        about = model.config
        check_frames(config.frames, about.tubelet_size)
        self.frames, self.size, self.dtype = config.frames, about.crop_size, DTYPES[config.dtype]
        self.steps = config.frames // about.tubelet_size
        self.trunk = model.encoder
        adapt(self.trunk, config, LINEAR)
        self.head = PromptedHead(self.steps, about.hidden_size, text_dim, config.dim)

    def forward(self, clips: Tensor, prompts: Prompts, reference: Tensor | None = None) -> Tensor:
        """[B, F, 3, H, W] in [-1, 1], B prompts -> [B, 1]."""
        frames = resized(evenly_spaced(clips, self.frames), self.size, self.size, MEAN, DEVIATION)
        tokens = self.trunk(frames.to(self.dtype)).last_hidden_state
        return self.head(tokens.unflatten(1, (self.steps, -1)), prompts.embeddings)
