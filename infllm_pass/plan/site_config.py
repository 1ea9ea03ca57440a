"""What each attention site is configured with: the model's configuration, or the answer of the user's function."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from infllm_pass.config import SparseAttentionConfig
from infllm_pass.errors import CarriedError, ConfigError
from infllm_pass.sites import AttentionSite

SiteFilter: TypeAlias = Callable[[AttentionSite], bool]
SiteConfig: TypeAlias = Callable[[AttentionSite], SparseAttentionConfig | Mapping[str, Any] | None]


def site_config_of(filter_fn: SiteFilter | None, site_config: SiteConfig | None) -> SiteConfig | None:
    """One function for both ways to decide about a site: the filter is asked first.

    Raises:
        ConfigError: one of them is not callable; by the function, when the filter returns no bool.
    """
    for name, function in (("filter_fn", filter_fn), ("site_config", site_config)):
        if function is not None and not callable(function):
            raise ConfigError(name, function, "a function of a site, or None")
    return site_config if filter_fn is None else _Filtered(filter_fn, site_config)


@dataclass(frozen=True)
class Configured:
    """What one site is configured with.

    Attributes:
        config: the configuration.
        channels: channels that token scores read as the function of sites gave them, not checked; None: it gave none.
        origin: where they come from, for people.
    """

    config: SparseAttentionConfig
    channels: object = None
    origin: str = ""


class _Filtered:
    """A site configuration behind a filter; a class, since sparsified models are pickled."""

    def __init__(self, filter_fn: SiteFilter, site_config: SiteConfig | None) -> None:
        self.filter_fn = filter_fn
        self.site_config = site_config

    def __call__(self, site: AttentionSite) -> SparseAttentionConfig | Mapping[str, Any] | None:
        answer: object = self.filter_fn(site)
        if not isinstance(answer, bool):
            raise ConfigError("filter_fn", answer, "a function that returns True or False for each site")
        if not answer:
            return None
        return {} if self.site_config is None else self.site_config(site)


def configured(
    site_config: SiteConfig | None, site: AttentionSite, default: SparseAttentionConfig
) -> Configured | None:
    """The configuration of one site; None: the user wants it dense.

    Args:
        site_config: the user's function; a mapping that it returns holds the fields that differ from the default, and
            maybe ``"channels"``, those that token scores read, with ``"channels_from"``, their origin in words.
        site: the site.
        default: the model's configuration.

    Raises:
        CarriedError: with the function's own exception; with a `ConfigError` if it returned something else or a
            configuration that is not valid.
    """
    if site_config is None:
        return Configured(default)
    try:
        answer: object = site_config(site)
        if answer is None or isinstance(answer, SparseAttentionConfig):
            return None if answer is None else Configured(answer)
        if isinstance(answer, Mapping):
            fields = {**default.to_dict(), **answer}
            channels, origin = fields.pop("channels", None), fields.pop("channels_from", "given by site_config")
            return Configured(SparseAttentionConfig.from_dict(fields), channels, str(origin))
    except Exception as error:
        raise CarriedError(error) from error
    expected = "a function that returns a SparseAttentionConfig, a dict of the fields that differ, or None"
    raise CarriedError(ConfigError("site_config", answer, expected))
