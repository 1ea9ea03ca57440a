"""What a calibration found, as data: per site the channels of token scores, and what is recommended."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import Any

from torch import nn

from infllm_pass.config import LEAST_SCORE_DIMS
from infllm_pass.errors import CalibrationError, ExportError
from infllm_pass.kernels.geometry import ChannelSets, format_channels, parse_channels
from infllm_pass.lowering.export.atomic_file import written_whole
from infllm_pass.sites import AttentionSite

FORMAT = "infllm_pass calibration 1"
"""First entry of a file, to tell it from others and from later forms."""

Key = tuple[str, int]
"""What tells a site: dotted path of its module, and its number among the sites of that path."""


@dataclass(frozen=True)
class SiteCalibration:
    """What was found at one attention site.

    Attributes:
        module: dotted path of the module that the site was traced in.
        order: number of the site among those of the same path.
        head_dim: channels of a key.
        channels: those that token scores should read, ascending, one set for each key/value head.
        variance: variance of every channel of the keys, as the selection sees them, for each key/value head.
        chosen_by: what the channels were chosen by, for people.
        scorer: "pooled" where the published score misses little, or no more than token scores do, else "tokens"; None:
            the text was too short to tell.
        topk: the smallest budget, in the terms of the configuration's `topk`, with which that scorer misses little, or
            no more than with the full one; None: as for `scorer`.
        missed: share of the attention that the rows of the worst percent lose against the best choice of as many
            blocks, for "pooled" and "tokens" at the configuration's budget; empty: as for `scorer`.
    """

    module: str
    order: int
    head_dim: int
    channels: ChannelSets
    variance: tuple[tuple[float, ...], ...]
    chosen_by: str = ""
    scorer: str | None = None
    topk: int | None = None
    missed: Mapping[str, float] = field(default_factory=dict, hash=False)

    @property
    def key(self) -> Key:
        """What tells the site from the model's others."""
        return self.module, self.order


@dataclass(frozen=True)
class Calibration:
    """What was found at every switchable site of one model.

    `sparsify` takes it and reads its channels wherever the configuration's scorer is "tokens"; its recommendations are
    followed only where `with_recommendations` says so.

    Attributes:
        model: name of the model's class.
        parameters: number of the model's parameters; with the name it tells the model from others.
        tokens: tokens that were looked at.
        sites: the sites.
        follows: recommendations that are followed: "scorer", "topk".
    """

    model: str
    parameters: int
    tokens: int
    sites: tuple[SiteCalibration, ...]
    follows: tuple[str, ...] = ()

    def with_recommendations(self, *, scorer: bool = True, topk: bool = True) -> Calibration:
        """The same calibration, whose recommended scorers and budgets take the place of the configuration's."""
        wanted = {"scorer": scorer, "topk": topk}
        return replace(self, follows=tuple(name for name, follow in wanted.items() if follow))

    def for_part(self, path: str, part: nn.Module) -> Calibration:
        """The calibration of a part of the model, which is sparsified by itself.

        Args:
            path: dotted path of the part in the model that was calibrated.
            part: the part.

        Raises:
            CalibrationError: no site lies in it.
        """
        inside = [site for site in self.sites if site.module.startswith(f"{path}.")]
        if not inside:
            raise CalibrationError(f"the calibration of {self.model} has no site in {path}: calibrate this model")
        name, parameters = describe_model(part)
        sites = tuple(replace(site, module=site.module.removeprefix(f"{path}.")) for site in inside)
        return replace(self, model=name, parameters=parameters, sites=sites)

    def of(self, site: AttentionSite) -> SiteCalibration:
        """What was found at a site.

        Raises:
            CalibrationError: the calibration knows no such site, or one of another shape.
        """
        key = key_of(site)
        found = next((each for each in self.sites if each.key == key), None)
        place = f"{key[0] or 'the model itself'}, number {key[1]}"
        if found is None:
            raise CalibrationError(
                f"the calibration of {self.model} has {len(self.sites)} sites and none at {place}: calibrate this model"
            )
        shape = int(site.kv_heads), int(site.shape(site.key_heads)[3])
        if shape != (len(found.channels), found.head_dim):
            raise CalibrationError(
                f"at {place} the model has {shape[0]} key/value heads of {shape[1]} channels, the calibration "
                f"{len(found.channels)} of {found.head_dim}: calibrate this model"
            )
        return found

    def answer(self, site: AttentionSite) -> dict[str, Any]:
        """What a site is configured with, in the form of a `site_config`.

        Raises:
            CalibrationError: see `of`.
        """
        found = self.of(site)
        answer: dict[str, Any] = {"channels": found.channels, "channels_from": f"calibrated, {found.chosen_by}"}
        answer |= {name: getattr(found, name) for name in self.follows if getattr(found, name) is not None}
        return answer

    def check_model(self, model: object) -> None:
        """Check that the calibration belongs to a model.

        Raises:
            CalibrationError: it is that of another.
        """
        if not isinstance(model, nn.Module):
            return
        name, parameters = describe_model(model)
        if (name, parameters) != (self.model, self.parameters):
            raise CalibrationError(
                f"the calibration is that of {self.model} with {self.parameters} parameters, and this is {name} with "
                f"{parameters}: calibrate this model"
            )

    def to_dict(self) -> dict[str, Any]:
        """The calibration as plain data that `from_dict` reads back."""
        sites = [{**asdict(site), "channels": format_channels(site.channels)} for site in self.sites]
        return {"format": FORMAT, **asdict(self), "sites": sites}

    @classmethod
    def from_dict(cls, data: object) -> Calibration:
        """Read what `to_dict` wrote.

        Raises:
            CalibrationError: it is something else, or damaged.
        """
        if not isinstance(data, Mapping) or data.get("format") != FORMAT:
            raise CalibrationError(f"not a calibration: expected a JSON object with the format {FORMAT!r}")
        listed = data.get("sites")
        if not isinstance(listed, Sequence) or isinstance(listed, str) or not listed:
            raise CalibrationError("the calibration lists no sites")
        sites = tuple(_site(entry) for entry in listed)
        if len({site.key for site in sites}) != len(sites):
            raise CalibrationError("the calibration holds a site twice")
        follows = data.get("follows", ())
        if not isinstance(follows, (list, tuple)) or not set(follows) <= {"scorer", "topk"}:
            raise CalibrationError(f"the calibration follows {follows!r}: expected some of 'scorer', 'topk'")
        return cls(
            _entry(data, "model", str),
            _entry(data, "parameters", int),
            _entry(data, "tokens", int),
            sites,
            tuple(follows),
        )

    def save(self, path: str | PathLike[str]) -> None:
        """Write the calibration as JSON, the whole file or none of it.

        Raises:
            CalibrationError: the file cannot be written.
        """
        target = Path(path)
        if target.is_dir() or not target.parent.is_dir():
            raise CalibrationError(f"{target} cannot be written: give a file in a folder that exists")
        try:
            with written_whole(target) as temporary:
                temporary.write_text(json.dumps(self.to_dict(), indent=1) + "\n")
        except ExportError as error:  # what `written_whole` makes of the system's refusal
            raise CalibrationError(str(error)) from error

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Calibration:
        """Read a file that `save` wrote. It is data: nothing of it is executed.

        Raises:
            CalibrationError: there is no such file, or it is no calibration.
        """
        try:
            data = json.loads(Path(path).read_text())
        except OSError as error:
            raise CalibrationError(f"{path} cannot be read: {error.strerror}") from error
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise CalibrationError(f"{path} is no calibration: {error}") from error
        return cls.from_dict(data)

    @classmethod
    def coerce(cls, value: object) -> Calibration:
        """Accept a calibration, or the path of one.

        Raises:
            CalibrationError: the value is neither.
        """
        if isinstance(value, cls):
            return value
        if isinstance(value, (str, PathLike)):
            return cls.load(value)
        raise CalibrationError(f"expected a Calibration or the path of one, got {type(value).__name__}")


def key_of(site: AttentionSite) -> Key:
    """What tells a site from the others of its model."""
    parts = site.module_path.split(".")
    if parts[0] == "args" and len(parts) > 1 and parts[1].isdecimal():  # where a model is compiled through its call
        parts = parts[2:]
    return ".".join(parts), site.order


def describe_model(model: nn.Module) -> tuple[str, int]:
    """A model's class and number of parameters."""
    return type(model).__name__, sum(parameter.numel() for parameter in model.parameters())


def _entry(data: Mapping[str, Any], name: str, kind: type) -> Any:
    value = data.get(name)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise CalibrationError(f"the calibration's {name} is {value!r}: expected {kind.__name__}")
    return value


def _site(entry: object) -> SiteCalibration:
    """A site of a file.

    Raises:
        CalibrationError: an entry is missing, or does not fit the others.
    """
    if not isinstance(entry, Mapping):
        raise CalibrationError("a site of the calibration is no JSON object")
    head_dim, text = _entry(entry, "head_dim", int), _entry(entry, "channels", str)
    place = f"{_entry(entry, 'module', str)}, number {_entry(entry, 'order', int)}"
    try:
        channels = parse_channels(text)
        variance = tuple(tuple(float(value) for value in row) for row in entry["variance"])
    except (KeyError, TypeError, ValueError) as error:
        raise CalibrationError(f"at {place} the calibration has no channels or variances that can be read") from error
    sizes = {len(each) for each in channels}
    whole = len(sizes) == 1 and all(0 < size <= head_dim for size in sizes)
    if not whole or any(size % LEAST_SCORE_DIMS and size != head_dim for size in sizes):
        raise CalibrationError(f"at {place}: sets of one size, a multiple of {LEAST_SCORE_DIMS}, are expected")
    if any(list(each) != sorted(set(each)) or each[-1] >= head_dim for each in channels):
        raise CalibrationError(f"at {place}: channels are not different, ascending and below head_dim={head_dim}")
    if len(variance) != len(channels) or any(len(row) != head_dim for row in variance):
        raise CalibrationError(f"at {place}: variances are not {len(channels)} rows of {head_dim}")
    scorer, topk, missed = entry.get("scorer"), entry.get("topk"), entry.get("missed", {})
    if scorer not in (None, "pooled", "tokens"):
        raise CalibrationError(f"at {place}: the scorer {scorer!r} is not 'pooled' or 'tokens'")
    if topk is not None and (not isinstance(topk, int) or isinstance(topk, bool) or topk < 1):
        raise CalibrationError(f"at {place}: topk is {topk!r}, and no number of blocks")
    if not isinstance(missed, Mapping) or not all(isinstance(value, (int, float)) for value in missed.values()):
        raise CalibrationError(f"at {place}: what scores miss is not given as numbers")
    return SiteCalibration(
        module=entry["module"],
        order=entry["order"],
        head_dim=head_dim,
        channels=channels,
        variance=variance,
        chosen_by=_entry(entry, "chosen_by", str),
        scorer=scorer,
        topk=topk,
        missed=dict(missed),
    )
