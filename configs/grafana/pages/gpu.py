"""One card, by its UUID: what it does, and how it fares."""

from __future__ import annotations

from panels import (
    BYTES,
    CELSIUS,
    COUNT,
    GREEN,
    NONE_IS_GOOD,
    ORANGE,
    PER_HOUR,
    RED,
    SECONDS,
    SHARE,
    STACKED,
    YELLOW,
    Look,
    Page,
    Query,
    Section,
    choice,
    lines,
    number,
    rate,
    yes_and_no,
)

CARD = '@, gpu_uuid="$gpu"'
DCGM = 'UUID="$gpu"'

WHAT = Section(
    "This card",
    (
        number(
            "Card",
            f"crynux_gpu_info{{{CARD}}}",
            "Its name on the network, its whole GB, and the operator's name for it.",
            legend="{{gpu_name}} · {{vram_gb}} GB · {{gpu}}",
            span=9,
        ),
        number(
            "State",
            f"crynux_gpu_state{{{CARD}}} == 1",
            "Only what is ready or busy takes tasks.",
            legend="{{state}}",
        ),
        number(
            "Busy",
            f"rate(crynux_gpu_busy_seconds_total{{{CARD}}}[$__range])",
            "Share of the time shown above that went into attempts.",
            unit=SHARE,
        ),
        number(
            "Faults",
            f"increase(crynux_gpu_faults_total{{{CARD}}}[$__range])",
            "Attempts in the time shown above that failed by its device, memory or process.",
            steps=NONE_IS_GOOD,
            decimals=0,
        ),
        number(
            "Memory errors",
            f"crynux_gpu_ecc_uncorrected_errors{{{CARD}}}",
            "That couldn't be corrected, since the driver was loaded. Not every card counts them.",
            steps=NONE_IS_GOOD,
        ),
        number(
            "Right canary",
            f"time() - crynux_gpu_canary_timestamp_seconds{{{CARD}}}",
            "Since it last gave the expected answer to its canary. A busy card isn't asked.",
            unit=SECONDS,
            steps=((None, GREEN), (14400, YELLOW)),
        ),
    ),
)

COURSE = Section(
    "In the course of time",
    (
        yes_and_no(
            "State",
            Query(f"crynux_gpu_state{{{CARD}}}", "{{state}}"),
            "The band of the state that the card was in is coloured.",
        ),
        lines(
            "Busy",
            [
                Query(
                    rate("crynux_gpu_busy_seconds_total", CARD),
                    "on attempts",
                )
            ],
            "Share of the time that is spent on attempts.",
            unit=SHARE,
            look=Look(most=1),
            span=12,
        ),
        lines(
            "Memory",
            [Query(f"crynux_gpu_memory_bytes{{{CARD}}}", "{{use}}")],
            "Of models, of all else that runs on the card, and free.",
            unit=BYTES,
            look=STACKED,
        ),
        lines(
            "Temperature",
            [Query(f"crynux_gpu_temperature_celsius{{{CARD}}}", "card")],
            "As the driver says; a simulated card has none.",
            unit=CELSIUS,
            look=Look(least=None, limits=((None, GREEN), (83, ORANGE), (90, RED))),
        ),
        lines(
            "Faults",
            [Query(rate("crynux_gpu_faults_total", CARD) + " * 3600", "faults")],
            "Attempts that failed by the card.",
            unit=PER_HOUR,
            look=Look(bars=True),
        ),
    ),
)

HARDWARE = Section(
    "From dcgm-exporter, where the site has one",
    (
        lines(
            "Utilisation",
            [Query(f"DCGM_FI_DEV_GPU_UTIL{{{DCGM}}}", "kernels run")],
            "Share of the time in which any kernel ran.",
            unit="percent",
            look=Look(most=100),
            span=6,
        ),
        lines(
            "Power",
            [Query(f"DCGM_FI_DEV_POWER_USAGE{{{DCGM}}}", "drawn")],
            "What the card draws.",
            unit="watt",
            span=6,
        ),
        lines(
            "Clock",
            [Query(f"DCGM_FI_DEV_SM_CLOCK{{{DCGM}}} * 1e6", "processors")],
            "It falls when the card is throttled.",
            unit="hertz",
            span=6,
        ),
        lines(
            "Xid",
            [Query(f"DCGM_FI_DEV_XID_ERRORS{{{DCGM}}}", "last Xid")],
            "The driver's last complaint about the card; NVIDIA's list says what each means.",
            unit=COUNT,
            span=6,
        ),
    ),
    folded=True,
)

PAGE = Page(
    uid="crynux-gpu",
    title="crynux-cluster: one GPU",
    about="What one card does, and how it fares.",
    sections=(WHAT, COURSE, HARDWARE),
    variables=(
        choice(
            "gpu",
            "Card",
            'label_values(crynux_gpu_info{cluster=~"$cluster"}, gpu_uuid)',
            about="Its UUID, which stays over restarts; dcgm-exporter knows it by the same.",
            every=False,
        ),
    ),
)
