"""A site configuration made of a calibration and of what the user's own function says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from infllm_pass.calibration.record import Calibration
from infllm_pass.config import SparseAttentionConfig
from infllm_pass.plan.site_config import SiteConfig
from infllm_pass.sites import AttentionSite


class CalibratedSites:
    """The `site_config` of a calibration; a class, since sparsified models are pickled.

    Args:
        calibration: gives channels, and recommendations if it is to be followed.
        site_config: the user's function, whose answers come before the calibration's; None: there is none.
    """

    def __init__(self, calibration: Calibration, site_config: SiteConfig | None) -> None:
        self.calibration = calibration
        self.site_config = site_config

    def __call__(self, site: AttentionSite) -> SparseAttentionConfig | Mapping[str, Any] | None:
        """A site's configuration, as `sparsify` asks for it; None: the user wants the site dense.

        Raises:
            CalibrationError: the calibration does not know the site.
        """
        own = {} if self.site_config is None else self.site_config(site)
        if own is None:
            return None
        if isinstance(own, SparseAttentionConfig):
            own = own.to_dict()
        return {**self.calibration.answer(site), **own} if isinstance(own, Mapping) else own
