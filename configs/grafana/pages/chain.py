"""What lies between the cards and their money: endpoints, transactions, the relay."""

from __future__ import annotations

from panels import (
    CNX,
    COUNT,
    GREEN,
    NONE_IS_GOOD,
    ORANGE,
    PER_HOUR,
    PER_SECOND,
    RED,
    SECONDS,
    SHARE,
    SOME_IS_GOOD,
    STACKED,
    YES_IS_GOOD,
    Look,
    Page,
    Query,
    Section,
    hourly,
    lines,
    number,
    of_journals,
    quantile,
    rate,
)

_CALLS = "crynux_rpc_calls_total"
_RELAY = "crynux_relay_calls_total"
_LOST = '@, result=~"failed|throttled"'
_FAILED = '@, result=~"refused|unreachable|error"'
_UNDER_WAY = 'state=~"new|signed|sent"'
_ON_CHAIN = 'stage=~"seen|score_sent|score_mined|validated|paid"'


def _standing(states: str) -> str:
    return of_journals("state", "crynux_outbox_rows", f"@, {states}")


def _slowest(stages: str) -> Query:
    return Query(
        quantile(0.9, "crynux_task_stage_seconds", "stage, le", f"@, {stages}"), "{{stage}}"
    )


NOW = Section(
    "Now",
    (
        number(
            "Chain",
            "min(crynux_chain_reached{@})",
            "An endpoint gives answers to go by.",
            words=YES_IS_GOOD,
            steps=SOME_IS_GOOD,
        ),
        number(
            "Relay",
            "min(crynux_relay_reached{@})",
            "Its last call went through.",
            words=YES_IS_GOOD,
            steps=SOME_IS_GOOD,
        ),
        number(
            "Newest block's age",
            "max(time() - crynux_chain_head_timestamp_seconds{@})",
            "As long as the chain makes blocks it stays near their interval.",
            unit=SECONDS,
            steps=((None, GREEN), (60, ORANGE), (300, RED)),
        ),
        number(
            "Endpoints passed over",
            "sum(crynux_rpc_endpoints{@} - crynux_rpc_endpoints_fit{@})",
            "They don't answer, lag, or aren't believed; crynux-cluster status says why.",
            steps=((None, GREEN), (1, ORANGE)),
        ),
        number(
            "RPC calls that fail",
            f"sum({rate(_CALLS, _LOST)}) / sum({rate(_CALLS)})",
            "Share of all calls; another endpoint is asked at once.",
            unit=SHARE,
            steps=((None, GREEN), (0.05, ORANGE), (0.5, RED)),
        ),
        number(
            "Writes under way",
            f"sum({_standing(_UNDER_WAY)})",
            "Transactions that aren't in a block yet.",
        ),
        number(
            "Reorganisations, last day",
            'sum(increase(crynux_chain_events_total{@, event="reorganised"}[1d]))',
            "Blocks that were replaced by others; what was in them is looked for anew.",
            decimals=0,
        ),
        number(
            "Transactions that vanished",
            'sum(increase(crynux_chain_events_total{@, event="vanished"}[1d]))',
            "Mined, and gone with their block, in the last day; they are sent again.",
            steps=NONE_IS_GOOD,
            decimals=0,
        ),
    ),
)

ENDPOINTS = Section(
    "Endpoints",
    (
        lines(
            "Fit to be asked",
            [Query("crynux_rpc_endpoint_fit{@}", "{{endpoint}}")],
            "1: it answers and is believed.",
            unit=COUNT,
            look=Look(most=1),
        ),
        lines(
            "How long they take to answer",
            [Query("crynux_rpc_endpoint_answer_seconds{@}", "{{endpoint}}")],
            "A mean of the last calls.",
            unit=SECONDS,
        ),
        lines(
            "Blocks behind the first",
            [
                Query(
                    "max by (cluster, instance) (crynux_rpc_endpoint_head_block{@}) "
                    "- on (cluster, instance) group_right () crynux_rpc_endpoint_head_block{@}",
                    "{{endpoint}}",
                )
            ],
            "More than three, and an endpoint is passed over.",
            unit=COUNT,
            look=Look(limits=((None, GREEN), (3, ORANGE))),
        ),
        lines(
            "Calls by result",
            [Query(f"sum by (result) ({rate(_CALLS)})", "{{result}}")],
            "To all endpoints. A refused one was understood: what it asks for would revert.",
            unit=PER_SECOND,
            look=STACKED,
        ),
        lines(
            "Calls by method",
            [Query(f"sum by (method) ({rate(_CALLS)})", "{{method}}")],
            "What an endpoint's owner bills.",
            unit=PER_SECOND,
            look=STACKED,
        ),
        lines(
            "Calls that didn't go through, by method",
            [
                Query(
                    f"sum by (method) ({rate(_CALLS, _LOST)})",
                    "{{method}}",
                )
            ],
            "Failed or throttled.",
            unit=PER_SECOND,
            look=STACKED,
        ),
    ),
)

TRANSACTIONS = Section(
    "Transactions",
    (
        lines(
            "Writes by where they stand",
            [Query(_standing('state!~"final|refused|reverted"'), "{{state}}")],
            "New, signed, sent, or mined in a block that may yet be replaced.",
            unit=COUNT,
            look=STACKED,
        ),
        lines(
            "Writes that came to nothing",
            [Query(_standing('state=~"refused|reverted"'), "{{state}}")],
            "All that the journal has. Refused ones were never sent; a reverted one cost gas.",
            unit=COUNT,
        ),
        lines(
            "What the chain did to them",
            [
                Query(
                    hourly("event", "crynux_chain_events_total"),
                    "{{event}}",
                )
            ],
            "Replaced at a higher fee, vanished with their block, and reorganisations.",
            unit=PER_HOUR,
        ),
        lines(
            "The slowest tenth of what waits for the chain",
            [_slowest(_ON_CHAIN)],
            "Until a task is seen, its score sent, mined and validated; from upload to payment.",
            unit=SECONDS,
            span=16,
        ),
        lines(
            "Gas",
            [
                Query(
                    hourly("gpu_name", "crynux_gas_cnx_total"),
                    "{{gpu_name}}",
                )
            ],
            "CNX paid in an hour for transactions that were mined, by the account's class.",
            unit=CNX,
            look=STACKED,
        ),
    ),
)

RELAY = Section(
    "Relay",
    (
        lines(
            "Calls by result",
            [Query(f"sum by (result) ({rate(_RELAY)})", "{{result}}")],
            "Not ready is no fault: the application hasn't handed the parameters over yet.",
            unit=PER_SECOND,
            look=STACKED,
        ),
        lines(
            "Calls that didn't go through",
            [
                Query(
                    f"sum by (call) ({rate(_RELAY, _FAILED)})",
                    "{{call}}",
                )
            ],
            "By what was asked for.",
            unit=PER_SECOND,
            look=STACKED,
        ),
        lines(
            "The slowest tenth of what waits for the relay",
            [_slowest('stage=~"parameters|uploaded"')],
            "Until parameters are there, and until results are handed over.",
            unit=SECONDS,
        ),
    ),
)

PAGE = Page(
    uid="crynux-chain",
    title="crynux-cluster: chain and relay",
    about="Endpoints, transactions and the relay: what lies between the cards and their money.",
    sections=(NOW, ENDPOINTS, TRANSACTIONS, RELAY),
)
