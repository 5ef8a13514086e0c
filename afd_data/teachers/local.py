"""Teacher `local`: any text-to-video pipeline of diffusers, from a folder or the Hub, on this machine's GPU or CPU.

Weights are read from safetensors only, and no code of a repository is ever run.  Requests of several worker threads are
drawn together, up to `batch` at a time: a batch begins when it is full, or when no further request has come for a
moment.  `cache.workers` of twice the batch keep the device busy while finished videos are written.

Every sample has a generator of its own, on the CPU and seeded with the request's seed, so its noise depends neither on
the batch nor on the device.  What a batch may change is rounding: kernels are chosen by its size, so the same request
drawn among others can differ in the last bits of its numbers, and by a level or so in some pixels.  The batch is
therefore no part of a request's fingerprint; the same goes for the device.

The pipeline is asked for the recipe's size and number of frames, or for what `options` says instead (`height`, `width`,
`num_frames`); what it draws is cut or filled up to the recipe's by the rules of `clip`.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from afd_data.errors import UserError
from afd_data.hub import short
from afd_data.teacher_config import LocalConfig
from afd_data.teachers import Delivery, Free, Identity, Request
from afd_data.teachers.clip import bring_frames
from afd_data.teachers.gathering import Gatherer
from afd_data.teachers.pipelines import Model, as_uint8, checked_arguments, load, open_device, open_dtype, too_large
from afd_data.video import write_mp4


class Local(Free):
    """See the module.

    Raises UserError when there is no such model, when it is no pipeline that makes videos from text alone, or when it
    does not take the settings.  The weights are loaded with the first video.
    """

    def __init__(self, config: LocalConfig) -> None:
        self.config = config
        self._model = Model(config.model)
        self._takes = checked_arguments(self._model.index, config)
        self._device = open_device(config.device)
        self._dtype = open_dtype(config.dtype, self._device)
        self._pipeline: Any = None
        self._loading = threading.Lock()
        self._gatherer: Gatherer[Request, Any] = Gatherer(config.batch, self._draw)
        kept = {"steps", "guidance", "negative_prompt", "options", "fit", "short", "start"}
        about = {"pipeline": self._model.index["_class_name"], "dtype": str(self._dtype).removeprefix("torch.")}
        self.identity = Identity(
            name="local",
            version="1",
            settings=self._model.facts | about | config.model_dump(include=kept),
            licence=config.licence,
            distillation=config.distillation,
            terms_url=config.terms_url,
        )

    def prompts(self) -> list[str]:
        """None of its own."""
        return []

    def submit(self, request: Request) -> str:
        """Takes everything."""
        return request.fingerprint

    def fetch(self, job_id: str, request: Request, target: Path) -> Delivery:
        """Draw the video into `target`.

        Raises RejectedError (too short, where the rules forbid that), FailedError (it drew numbers that are none),
        UserError (out of memory, cannot be loaded, a size that it does not draw).
        """
        import diffusers

        frames = as_uint8(self._gatherer.do(request))
        clip = bring_frames(request.video, frames, self.config.model, self.config)
        write_mp4(target, clip.frames, request.video)
        return Delivery(
            effective={
                **{name: value for name, value in request.video.model_dump().items() if name != "lossless"},
                "start_s": round(clip.start_s, 6),
                "frames_made_up": clip.made_up,
                "fit": self.config.fit,
                "source": dict(zip(("frames", "height", "width"), frames.shape[:3], strict=True)),
            },
            provenance={**self._model.facts, "diffusers": diffusers.__version__, "device": self._device.type},
        )

    def _draw(self, requests: list[Request]) -> list[Any]:
        """One clip a request, as the pipeline returns it."""
        import torch

        pipeline = self._loaded()
        try:
            clips = pipeline(**self._arguments(requests)).frames
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise too_large(self.config, self._device, error) from None
        except (RuntimeError, ValueError, TypeError, AttributeError) as error:
            if "allocate memory" in str(error):
                raise too_large(self.config, self._device, error) from None
            raise UserError(
                f"teacher.model: {type(pipeline).__name__} did not draw a video: {short(error)}. "
                "Set video.* or teacher.options to what it takes."
            ) from error
        if len(clips) != len(requests):
            raise UserError(
                f"teacher.options: {len(clips)} videos came back for {len(requests)} prompts; want one each"
            )
        return list(clips)

    def _arguments(self, requests: list[Request]) -> dict[str, Any]:
        import torch

        video = requests[0].video
        assert all(request.video == video for request in requests), "one recipe, one shape"
        offered = {
            "height": video.height,
            "width": video.width,
            "num_frames": video.frames,
            "num_inference_steps": self.config.steps,
            "guidance_scale": self.config.guidance,
            "negative_prompt": self.config.negative_prompt or None,
            "output_type": "np",
        }
        return {
            **{name: value for name, value in offered.items() if value is not None and name in self._takes},
            **self.config.options,
            "prompt": [request.prompt for request in requests],
            "generator": [torch.Generator("cpu").manual_seed(request.seed) for request in requests],
        }

    def _loaded(self) -> Any:
        with self._loading:
            if self._pipeline is None:
                self._pipeline = load(self._model, self.config, self._device, self._dtype)
            return self._pipeline
