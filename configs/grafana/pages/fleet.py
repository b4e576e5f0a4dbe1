"""The first look: does everything earn, and what needs a hand."""

from __future__ import annotations

from panels import (
    BYTES,
    BYTES_A_SECOND,
    CNX,
    COUNT,
    FEW_IS_GOOD,
    GREEN,
    NONE_IS_GOOD,
    ORANGE,
    PARTS,
    PER_HOUR,
    PER_SECOND,
    RED,
    SECONDS,
    SHARE,
    SOME_IS_GOOD,
    STACKED,
    YELLOW,
    YES_IS_GOOD,
    Look,
    Page,
    Query,
    Section,
    choice,
    hourly,
    lines,
    number,
    quantile,
    rate,
    rows_of,
)

CARD_URL = "/d/crynux-gpu?var-gpu=${__value.raw}&${datasource:queryparam}&${cluster:queryparam}"
PAID = 'outcome=~"EndSuccess|EndGroupSuccess"'

NOW = Section(
    "Now",
    (
        number(
            "Takes tasks",
            # One that stands by isn't ready: it is enough that whoever acts with its key is.
            "min(max by (identity) ("
            "crynux_identity_info{@} * ignoring (identity) group_left () crynux_ready{@}))",
            "What /readyz says: chain and relay, lease, an account, a card, and no drain of all.",
            words=YES_IS_GOOD,
            steps=SOME_IS_GOOD,
        ),
        number(
            "Alerts",
            'count(ALERTS{@, alertname=~"Crynux.*", alertstate="firing"}) or vector(0)',
            "Firing now; docs/alerts.md has a paragraph on each.",
            steps=NONE_IS_GOOD,
        ),
        number(
            "Problems",
            "sum(crynux_problems{@})",
            "Lines that the status has under problems: crynux-cluster status.",
            steps=FEW_IS_GOOD,
        ),
        number(
            "Cards that serve",
            'sum(crynux_gpus{@class, state=~"ready|busy"})',
            "Ready or busy.",
            steps=SOME_IS_GOOD,
        ),
        number(
            "Cards that don't",
            'sum(crynux_gpus{@class, state=~"starting|unreachable|quarantined"})',
            "Starting, unreachable or quarantined; not those that somebody drained.",
            steps=FEW_IS_GOOD,
        ),
        number(
            "Accounts short",
            "sum(clamp_min(crynux_accounts_wanted{@class} - ignoring (status) sum without (status) "
            '(crynux_accounts{@class, status=~"available|busy"}), 0))',
            "How many accounts fewer serve than the cards could use.",
            steps=FEW_IS_GOOD,
        ),
        number(
            "Tasks paid, last hour",
            f"sum(increase(crynux_tasks_total{{@, {PAID}}}[1h]))",
            "Alone or in a group.",
            decimals=0,
        ),
        number(
            "Earned, last day",
            "sum(increase(crynux_paid_cnx_total{@class}[1d]))",
            "Payments for tasks, before gas.",
            unit=CNX,
        ),
    ),
)

TASKS = Section(
    "Tasks",
    (
        lines(
            "Tasks by how they ended",
            [
                Query(
                    hourly("outcome", "crynux_tasks_total"),
                    "{{outcome}}",
                )
            ],
            "EndInvalidated cost a stake. EndGroupRefund is paid when the first of its group ends.",
            unit=PER_HOUR,
            look=STACKED,
        ),
        lines(
            "Tasks in hand",
            [Query("sum by (progress) (crynux_open_tasks{@})", "{{progress}}")],
            "Tasks that aren't closed, by how far we are with them.",
            unit=COUNT,
            look=STACKED,
        ),
        lines(
            "Attempts that gave no result",
            [
                Query(
                    hourly("fault", "crynux_attempts_total", '@, fault!="none"'),
                    "{{fault}}",
                )
            ],
            "By why. None is reported to the network; each is tried again while time allows.",
            unit=PER_HOUR,
            look=STACKED,
        ),
        lines(
            "Where time goes",
            [
                Query(
                    f"sum by (stage) ({rate('crynux_task_stage_seconds_sum')}) "
                    f"/ sum by (stage) ({rate('crynux_task_stage_seconds_count')})",
                    "{{stage}}",
                )
            ],
            "Mean time of each stage of a task's life, on top of each other: a task's whole time.",
            unit=SECONDS,
            look=STACKED,
            span=12,
        ),
        lines(
            "The slowest tenth of each stage",
            [
                Query(
                    quantile(0.9, "crynux_task_stage_seconds", "stage, le"),
                    "{{stage}}",
                )
            ],
            "Nine of ten tasks took less.",
            unit=SECONDS,
            span=12,
        ),
        lines(
            "Time left when a score goes out",
            [
                Query(
                    quantile(share, "crynux_score_slack_seconds"),
                    name,
                )
                for share, name in ((0.05, "the tightest twentieth"), (0.5, "median"))
            ],
            "Until the network takes no answer any more.",
            unit=SECONDS,
            look=Look(limits=((None, RED), (10, YELLOW), (30, GREEN))),
        ),
        lines(
            "Where a result's models lay",
            [
                Query(
                    hourly("tier", "crynux_results_total"),
                    "{{tier}}",
                )
            ],
            "When its card began: on the device, in host memory, on disk, or away.",
            unit=PER_HOUR,
            look=PARTS,
        ),
        lines(
            "Canaries and verifications",
            [
                Query(
                    hourly("result", "crynux_canaries_total"),
                    "canary {{result}}",
                ),
                Query(
                    hourly("result", "crynux_verifications_total"),
                    "verification {{result}}",
                ),
                Query(
                    hourly("by", "crynux_quarantines_total"),
                    "quarantined by {{by}}",
                ),
            ],
            "What showed that cards compute rightly, or not.",
            unit=PER_HOUR,
        ),
    ),
)

CARDS = Section(
    "Cards and accounts",
    (
        lines(
            "Cards by state",
            [Query("sum by (state) (crynux_gpus{@class})", "{{state}}")],
            "Of the chosen classes.",
            unit=COUNT,
            look=STACKED,
        ),
        lines(
            "How busy the cards are",
            [
                Query(
                    f"sum by (gpu_name, vram_gb) ({rate('crynux_gpu_busy_seconds_total')} * "
                    "on (instance, gpu_uuid) group_left (gpu_name, vram_gb) "
                    "crynux_gpu_info{@class}) "
                    "/ count by (gpu_name, vram_gb) (crynux_gpu_info{@class})",
                    "{{gpu_name}} {{vram_gb}} GB",
                )
            ],
            "Share of the time that is spent on attempts, a mean of each class.",
            unit=SHARE,
            look=Look(most=1),
        ),
        lines(
            "Accounts by status",
            [Query("sum by (status) (crynux_accounts{@class})", "{{status}}")],
            "As the network has them.",
            unit=COUNT,
            look=STACKED,
        ),
        rows_of(
            "Cards",
            "crynux_gpu_info{@class} * on (instance, gpu_uuid) group_left (state) "
            "(crynux_gpu_state{@} == 1)",
            "Every card with its state. A click on a UUID opens the card's dashboard.",
            columns={
                "gpu_uuid": "UUID",
                "gpu": "card",
                "gpu_name": "name",
                "vram_gb": "GB",
                "ray_node": "Ray node",
                "state": "state",
            },
            link=(
                "UUID",
                "This card",
                CARD_URL,
            ),
            span=16,
        ),
        lines(
            "QoS of the accounts that serve",
            [Query("crynux_qos_score{@class}", "{{gpu_name}} {{of}}")],
            "Each finished task adds to it; who has less is chosen less, and removed in the end.",
            unit=COUNT,
        ),
    ),
)

MODELS = Section(
    "Models",
    (
        lines(
            "Room for models",
            [Query("max(crynux_store_fullest_ratio{@})", "fullest machine")],
            "Used of what models may take, where it is most. A full store is no fault in itself.",
            unit=SHARE,
            look=Look(most=1, limits=((None, GREEN), (0.95, ORANGE))),
            span=6,
        ),
        lines(
            "Models on disk",
            [
                Query("sum(crynux_store_used_bytes{@})", "all machines"),
                Query("sum(crynux_store_leftover_bytes{@})", "left of broken downloads"),
                Query("sum(crynux_store_download_left_bytes{@})", "still to come"),
            ],
            "Bytes of all that was fetched, of what broke off and is kept for the next try, and of "
            "what downloads have still to bring.",
            unit=BYTES,
            span=6,
        ),
        lines(
            "What comes, and from where",
            [
                Query(
                    f"sum by (source) ({rate('crynux_store_fetched_bytes_total')})",
                    "{{source}}",
                ),
                Query("sum(crynux_store_download_bytes_per_second{@})", "under way"),
            ],
            "Whole models by source, and what runs now.",
            unit=BYTES_A_SECOND,
            span=6,
        ),
        lines(
            "What happens in the stores",
            [
                Query(
                    hourly("event", "crynux_store_events_total"),
                    "{{event}}",
                ),
                Query(
                    f"sum({rate('crynux_store_hits_total')}) * 3600",
                    "found there by tasks",
                ),
                Query(
                    hourly("rule", "crynux_store_refusals_total") + " > 0",
                    "refused: {{rule}}",
                ),
            ],
            "Fetched, evicted for others, broken off, damaged, failed; found there when a task "
            "needed it; and refused, by the rule.",
            unit=PER_HOUR,
            span=6,
        ),
        lines(
            "Waiting, fetching, missing",
            [
                Query("sum(crynux_store_queued_models{@})", "waiting"),
                Query("sum(crynux_store_downloads{@})", "being fetched"),
                Query("sum(crynux_store_missing_models{@})", "couldn't be had"),
                Query("sum(crynux_store_troubled_machines{@})", "machines that can't fetch"),
            ],
            "Models, and machines whose store is broken. crynux-cluster status --json names both, "
            "and why.",
            unit=COUNT,
            span=6,
        ),
        lines(
            "Until the last download is there",
            [Query("max(crynux_store_download_left_seconds{@})", "longest")],
            "By the rate of now, of those that run.",
            unit=SECONDS,
            span=6,
        ),
        lines(
            "Parts of models that moved",
            [
                Query(
                    f"sum by (move) ({rate('crynux_model_parts_moved_total')})",
                    "{{move}}",
                )
            ],
            "Loaded from disk, returned from host memory, sent away from the device or the host;"
            " spoilt: memory has changed them, and they were thrown away.",
            unit=PER_SECOND,
            span=12,
        ),
    ),
    folded=True,
)

COORDINATOR = Section(
    "The coordinator",
    (
        number(
            "Version",
            "count by (version) (crynux_build_info{@})",
            "What runs; several where clusters differ.",
            legend="{{version}}",
            span=6,
        ),
        number(
            "Runs since",
            "min(time() - crynux_process_start_time_seconds{@})",
            "Since the newest coordinator began. Counters begin at 0 with it.",
            unit=SECONDS,
            span=6,
        ),
        number(
            "Last look at an account",
            "max(time() - crynux_coordinator_last_turn_timestamp_seconds{@})",
            "It looks at one each fifteen seconds at least.",
            unit=SECONDS,
            steps=((None, GREEN), (60, ORANGE), (300, RED)),
            span=6,
        ),
        number(
            "Lease epoch",
            "max(crynux_lease_epoch{@})",
            "Rises by one with each term. 0: it doesn't hold the lease.",
            steps=SOME_IS_GOOD,
            span=6,
        ),
        lines(
            "Memory",
            [Query("crynux_process_resident_memory_bytes{@}", "{{instance}}")],
            "Of the coordinator's process.",
            unit=BYTES,
        ),
        lines(
            "Processor",
            [Query(rate("crynux_process_cpu_seconds_total"), "{{instance}}")],
            "Of the coordinator's process; 1 is one core.",
            unit=COUNT,
        ),
        lines(
            "How late its loop is",
            [
                Query(quantile(0.5, "crynux_loop_lag_seconds"), "median"),
                Query(quantile(0.99, "crynux_loop_lag_seconds"), "the worst hundredth"),
            ],
            "What is due waits so long for its turn.",
            unit=SECONDS,
        ),
    ),
    folded=True,
)

PAGE = Page(
    uid="crynux-fleet",
    title="crynux-cluster: fleet",
    about="Does everything earn, and what needs a hand.",
    sections=(NOW, TASKS, CARDS, MODELS, COORDINATOR),
    variables=(
        choice(
            "class",
            "Class of card",
            'label_values(crynux_gpus{cluster=~"$cluster"}, gpu_name)',
            about="A card's name on the network.",
        ),
    ),
)
