"""What comes in, what it costs, and what is at stake."""

from __future__ import annotations

from panels import (
    CNX,
    COUNT,
    GREEN,
    NONE_IS_GOOD,
    ORANGE,
    RED,
    SHARE,
    STACKED,
    Look,
    Page,
    Query,
    Section,
    choice,
    lines,
    number,
)

PAID, GAS = "crynux_paid_cnx_total", "crynux_gas_cnx_total"
_BY = "sum by (gpu_name, vram_gb)"
_NAME = "{{gpu_name}} {{vram_gb}} GB"


def _by_class(metric: str, window: str) -> str:
    return f"{_BY} (increase({metric}{{@class}}[{window}]))"


NOW = Section(
    "Now",
    (
        number(
            "Earned, last day",
            f"sum(increase({PAID}{{@class}}[1d]))",
            "Payments for tasks.",
            unit=CNX,
        ),
        number(
            "Gas, last day",
            f"sum(increase({GAS}{{@class}}[1d]))",
            "For transactions that were mined, joining and leaving too.",
            unit=CNX,
        ),
        number(
            "What is left of it",
            f"sum(increase({PAID}{{@class}}[1d])) - sum(increase({GAS}{{@class}}[1d]))",
            "Payments less gas, last day.",
            unit=CNX,
        ),
        number(
            "Treasury",
            "sum(crynux_treasury_cnx{@})",
            "It pays stakes and gas of the node accounts.",
            unit=CNX,
            steps=((None, RED), (0.05, GREEN)),
        ),
        number(
            "On the accounts",
            'sum(crynux_balance_cnx{@class, of="sum"})',
            "Earnings that weren't swept yet, and gas.",
            unit=CNX,
        ),
        number(
            "At stake",
            "sum(crynux_stake_cnx{@class})",
            "Comes back when an account leaves, unless it is slashed.",
            unit=CNX,
        ),
        number(
            "Slashed, 30 days",
            "sum(increase(crynux_slashes_total{@}[30d]))",
            "Accounts that lost their whole stake.",
            steps=NONE_IS_GOOD,
            decimals=0,
        ),
        number(
            "Kicked out, 30 days",
            "sum(increase(crynux_kick_outs_total{@}[30d]))",
            "Accounts that the network removed for their QoS; the stake came back.",
            steps=((None, GREEN), (1, ORANGE)),
            decimals=0,
        ),
    ),
)

EARNINGS = Section(
    "Earnings",
    (
        lines(
            "Earned in an hour",
            [Query(_by_class(PAID, "1h"), _NAME)],
            "Payments of the hour before each moment, by the account's class.",
            unit=CNX,
            look=STACKED,
            span=12,
        ),
        lines(
            "Earned in a day, less gas",
            [Query(f"{_by_class(PAID, '1d')} - {_by_class(GAS, '1d')}", _NAME)],
            "Of the day before each moment, by the account's class.",
            unit=CNX,
            look=Look(stacked="normal", least=None),
            span=12,
        ),
        lines(
            "A card's day",
            [
                Query(
                    f"{_by_class(PAID, '1d')} "
                    f"/ {_BY} (avg_over_time(crynux_gpus{{@class}}[1d]) > 0)",
                    _NAME,
                )
            ],
            "Earned in a day for each card of the class, whether or not it was busy.",
            unit=CNX,
        ),
        lines(
            "A busy hour",
            [
                Query(
                    f"{_by_class(PAID, '1d')} / ({_BY} "
                    "(increase(crynux_gpu_busy_seconds_total{@}[1d]) "
                    "* on (instance, gpu_uuid) group_left (gpu_name, vram_gb) "
                    "crynux_gpu_info{@class}) / 3600)",
                    _NAME,
                )
            ],
            "Earned for each hour that cards of the class spent on attempts, over a day.",
            unit=CNX,
        ),
        lines(
            "A task",
            [
                Query(
                    f"sum(increase({PAID}{{@}}[6h])) / sum(increase(crynux_tasks_total"
                    '{@, outcome=~"EndSuccess|EndGroupSuccess"}[6h]))',
                    "mean of six hours",
                )
            ],
            "Paid for one that was paid.",
            unit=CNX,
        ),
    ),
)

COSTS = Section(
    "Costs and reserves",
    (
        lines(
            "Gas in an hour",
            [Query(_by_class(GAS, "1h"), _NAME)],
            "Of the hour before each moment, by the account's class.",
            unit=CNX,
            look=STACKED,
        ),
        lines(
            "Gas as a share of earnings",
            [Query(f"{_by_class(GAS, '1d')} / {_by_class(PAID, '1d')}", _NAME)],
            "Of the day before each moment. Above 1 an account costs more than it earns.",
            unit=SHARE,
            look=Look(limits=((None, GREEN), (0.1, ORANGE), (1, RED))),
        ),
        lines(
            "Treasury",
            [Query("crynux_treasury_cnx{@}", "{{instance}}")],
            "Its balance.",
            unit=CNX,
        ),
        lines(
            "Stake",
            [Query(f"{_BY} (crynux_stake_cnx{{@class}})", _NAME)],
            "Of the accounts of a class.",
            unit=CNX,
            look=STACKED,
        ),
        lines(
            "The poorest account that serves",
            [Query('min by (gpu_name, vram_gb) (crynux_balance_cnx{@class, of="lowest"})', _NAME)],
            "Below fleet.gas_low it is topped up. 0 where none of the class serves.",
            unit=CNX,
        ),
        lines(
            "Accounts that need something",
            [
                Query("sum(crynux_accounts_understaked{@})", "less than the stake that is asked"),
                Query("sum(crynux_fleet_lacks{@})", "steps that lack something of yours"),
                Query("sum(crynux_class_stopped{@class})", "classes stopped by a slash"),
            ],
            "What crynux-cluster fleet plan and crynux-cluster status say in words.",
            unit=COUNT,
        ),
    ),
)

PAGE = Page(
    uid="crynux-money",
    title="crynux-cluster: money",
    about="What comes in, what it costs, what is at stake. For the books: crynux-cluster earnings.",
    sections=(NOW, EARNINGS, COSTS),
    variables=(
        choice(
            "class",
            "Class of card",
            'label_values(crynux_gpus{cluster=~"$cluster"}, gpu_name)',
            about="A card's name on the network.",
        ),
    ),
    since="now-7d",
)
