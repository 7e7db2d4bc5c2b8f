"""The paper's numbers (arXiv 2602.17951): success rates in percent, 500 episodes a suite."""

from __future__ import annotations

from dataclasses import dataclass, field

_SUITES = ("Spatial", "Object", "Goal", "Long", "Avg")
# Row label -> name of the arm that stands for it here.
_ARMS = {
    "OpenVLA-OFT": "baseline",
    "pi0.5": "baseline",
    "baseline": "baseline",
    "Spatial Forcing": "spatial_forcing",
    "naive multi-layer": "naive",
    "shared projector": "shared",
    "ROCKET": "rocket",
}


@dataclass(frozen=True)
class PublishedTable:
    """A table as printed: `columns` name the numbers of every row; rows are keyed by label, as `ours` keys arms."""

    columns: tuple[str, ...]
    rows: dict[str, tuple[float, ...]]
    ours: dict[str, str] = field(default_factory=lambda: _ARMS)


PUBLISHED: dict[str, PublishedTable] = {
    "table2": PublishedTable(
        _SUITES,
        {
            "OpenVLA": (84.7, 88.4, 79.2, 53.7, 76.5),
            "OpenVLA-OFT": (97.6, 98.4, 97.9, 94.5, 97.1),
            "SpatialVLA": (88.2, 89.9, 78.6, 55.5, 78.1),
            "GeoVLA": (98.4, 99.0, 96.6, 96.6, 97.7),
            "3D-CAVLA": (98.2, 99.8, 98.2, 96.1, 98.1),
            "GLaD": (95.0, 97.4, 94.4, 89.4, 94.1),
            "Spatial Forcing": (99.4, 99.6, 98.8, 96.0, 98.5),
            "ROCKET": (98.2, 99.8, 98.8, 97.0, 98.5),
        },
    ),
    "table3": PublishedTable(
        _SUITES,
        {
            "pi0.5": (96.4, 98.2, 95.0, 82.2, 93.0),
            "Spatial Forcing": (97.8, 97.8, 94.4, 85.8, 94.0),
            "ROCKET": (96.4, 98.8, 96.6, 89.2, 95.3),
        },
    ),
    "table4": PublishedTable(
        ("Avg",),
        {"4 pairs": (96.3,), "8 pairs": (97.4,), "16 pairs": (96.7,), "24 pairs": (94.1,)},
        {f"{count} pairs": f"rocket-pairs{count}" for count in (4, 8, 16, 24)},
    ),
    "table5": PublishedTable(
        ("Avg",),
        {
            "base": (95.0,),
            "uniform-8": (97.4,),
            "E2M-last1": (96.3,),
            "shallow": (94.7,),
            "middle": (93.7,),
            "deep": (95.3,),
            "sim1-top": (93.6,),
            "sim1-last": (95.6,),
            "sim2-top": (95.4,),
            "sim2-last": (95.1,),
        },
        {
            "base": "baseline",
            "uniform-8": "rocket-uniform",
            "E2M-last1": "rocket-e2m_last1",
            **{name: f"rocket-{name}" for name in ("shallow", "middle", "deep")},
            **{name: f"rocket-{name}" for name in ("sim1-top", "sim1-last", "sim2-top", "sim2-last")},
        },
    ),
    "table6": PublishedTable(
        ("Avg",),
        {"1%": (73.6,), "5%": (83.4,), "10%": (84.3,), "100%": (96.3,)},
        {"1%": "rocket-data1", "5%": "rocket-data5", "10%": "rocket-data10", "100%": "rocket"},
    ),
    "table7": PublishedTable(
        ("GPUs", "batch", "steps (thousands)", "Avg"),
        {
            "OpenVLA-OFT": (4, 64, 150, 97.1),
            "Spatial Forcing": (4, 64, 150, 98.5),
            "GeoVLA": (1, 256, 20, 97.7),
            "ROCKET": (1, 32, 50, 98.5),
        },
    ),
    "table8": PublishedTable(
        _SUITES,
        {
            "baseline": (96.9, 98.7, 97.6, 94.8, 96.4),
            "naive multi-layer": (93.6, 99.2, 42.2, 85.0, 80.0),
            "shared projector": (99.0, 99.8, 97.0, 96.8, 98.2),
            "ROCKET": (98.2, 99.8, 98.8, 97.0, 98.5),
        },
    ),
    "table9": PublishedTable(
        ("10k", "20k", "30k", "50k"),
        {
            "baseline": (70.0, 96.2, 96.4, 95.4),
            "Spatial Forcing": (66.9, 94.8, 96.4, 95.9),
            "naive multi-layer": (59.0, 78.0, 78.5, 80.0),
            "shared projector": (82.5, 96.4, 96.9, 98.2),
            "ROCKET": (78.0, 96.5, 96.8, 98.5),
        },
    ),
    "figure5": PublishedTable(("LIBERO-Plus Avg",), {"baseline": (80.0,), "ROCKET": (81.7,)}),
}
PUBLISHED["figure3"] = PUBLISHED["table9"]
