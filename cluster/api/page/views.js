// A status, shown: each function fills one part of the page from /v1/status as it came.

import { by, bytes, clock, cnx, fill, make, money, pairs, short, span, state } from "./dom.js";

const GPU_KIND = {
  ready: "good", busy: "busy", starting: "warn", drained: "warn", quarantined: "bad", unreachable: "bad",
};
const ACCOUNT_KIND = {
  available: "good", busy: "busy", paused: "warn", quit: "warn", pending_pause: "warn", pending_quit: "warn", unknown: "warn",
};

const MANY = 24;
/** Cards whose facts a person has opened or closed. */
const toggled = new Map();

const HELD_SECONDS = 30;
/** Since when sections aren't shown anew, because text in them is marked. */
const held = new Map();
document.addEventListener("selectstart", () => held.clear());

/** What of a section is shown anew when which fields of the status change. */
const PARTS = [
  { id: "gpus", fields: ["gpus"], draw: showGpus },
  // An open task's seconds go on.
  { id: "tasks", fields: ["tasks"], draw: showTasks, always: (status) => status.tasks.some(isOpen) },
  { id: "accounts", fields: ["accounts", "fleet"], draw: showAccounts },
  { id: "endpoints", fields: ["chain", "relay", "stores"], draw: showNetwork },
];

/** Parts that are older than the status. */
const due = new Set();

/** Shows what has changed; what has the focus keeps it. Returns what is held back, and what couldn't be drawn and why. */
export function show(status, openStory, changed) {
  const key = document.activeElement?.dataset?.key, back = [], failed = [];
  /** A mistake in one part leaves the others. */
  const drawn = (title, draw) => {
    try {
      draw(status, openStory);
      return true;
    } catch (error) {
      console.error(error);
      failed.push(`${title}: ${error.message}`);
      return false;
    }
  };
  for (const part of PARTS)
    if (part.always?.(status) || part.fields.some((field) => changed.includes(field))) due.add(part);
  by("version").textContent = status.version;
  drawn("what needs a hand", showAlerts);
  drawn("the glance", showGlance);
  for (const part of PARTS) {
    const section = by(part.id).closest("section"), marked = isMarked(section);
    if (!due.has(part)) continue;
    const title = section.querySelector("h2").textContent;
    if (marked) back.push(title);
    else if (drawn(title, part.draw)) due.delete(part);
  }
  if (key) document.querySelector(`[data-key="${CSS.escape(key)}"]`)?.focus({ preventScroll: true });
  return { back, failed };
}

/** Whether a person marks text in it, and hasn't for long: what is shown anew is marked no more. */
function isMarked(section) {
  const selection = getSelection();
  if (selection.isCollapsed || !selection.getRangeAt(0).intersectsNode(section)) {
    held.delete(section);
    return false;
  }
  if (!held.has(section)) held.set(section, Date.now());
  return Date.now() - held.get(section) < HELD_SECONDS * 1000;
}

const isOpen = (task) => task.outcome === null;
const serves = (account) => ["available", "busy"].includes(account.status);
/** It is for no class: no card needs it. */
const isSpare = (account) => account.status === "quit" && !account.gpu_class;

function showAlerts(status) {
  // What is missing says the headline.
  const told = status.problems.filter((text) => !status.missing.some((each) => each.includes(text)));
  by("alerts").hidden = told.length === 0;
  // They are never held back; as they were, they can be marked.
  const shown = [...by("alert-list").children].map((each) => each.textContent);
  if (JSON.stringify(shown) === JSON.stringify(told)) return;
  by("alert-list").replaceChildren(...told.map((text) => make("li", {}, text)));
}

function showGlance(status) {
  const serving = status.gpus.filter((gpu) => ["ready", "busy"].includes(gpu.state));
  const busy = serving.filter((gpu) => gpu.state === "busy").length;
  const joined = status.accounts.filter(serves).length;
  const closed = Object.values(status.totals.tasks).reduce((sum, each) => sum + each, 0);
  const head = status.chain.block_timestamp;
  const drain = status.drain.everything || status.drain.cards.length || status.drain.nodes.length;
  by("glance").replaceChildren(...pairs([
    ["GPUs that serve", `${serving.length} of ${status.gpus.length}`],
    ["computing now", `${busy}`],
    ["accounts that serve", `${joined} of ${status.accounts.filter((each) => !isSpare(each)).length}`],
    ["tasks open", `${status.tasks.filter(isOpen).length}`],
    ["tasks closed", closed.toLocaleString()],
    ["paid in all", `${money(status.totals.paid_wei)} CNX`],
    ["slashed", status.totals.slashed ? state("bad", `${status.totals.slashed}`) : "0"],
    ["treasury", status.fleet.treasury === null ? null : `${money(status.fleet.treasury, 2)} CNX`],
    ["block", status.chain.block === null ? "none" : `${status.chain.block.toLocaleString()}`],
    ["head's age", head === null ? null : span(Math.max(status.now - head, 0))],
    ["drain", drain ? state("warn", status.drain.done ? "done" : status.drain.left.join("; ") || "on") : null],
  ]));
}

function showGpus(status, openStory) {
  const simulated = status.gpus.filter((gpu) => gpu.simulated).length;
  by("gpus-note").textContent = simulated ? `${simulated} of them are simulated on the CPU.` : "";
  const sorted = [...status.gpus].sort((a, b) => isBad(b) - isBad(a) || a.gpu_id.localeCompare(b.gpu_id, undefined, { numeric: true }));
  by("gpus").classList.toggle("dense", sorted.length > MANY);
  by("gpus").replaceChildren(...sorted.map((gpu) => tile(gpu, status, openStory, sorted.length <= MANY)));
  if (!sorted.length) by("gpus").append(make("p", { class: "note" }, "No GPU is known in the cluster."));
}

const isBad = (gpu) => GPU_KIND[gpu.state] === "bad" || gpu.problem !== "";

function tile(gpu, status, openStory, open) {
  const kind = GPU_KIND[gpu.state], memory = gpu.memory;
  const total = memory ? memory.models + memory.other + memory.free : 0;
  const facts = [
    ["task", gpu.task ? link(gpu.task, openStory, gpu.gpu_id) : null],
    ["step", gpu.steps ? `${gpu.step ?? 0} of ${gpu.steps}` : null],
    ["VRAM", total ? `${bytes(memory.models)} models, ${bytes(memory.other)} other, ${bytes(memory.free)} free` : null],
    ["host memory", gpu.host_bytes ? bytes(gpu.host_bytes) : null],
    ["temperature", gpu.temperature === null ? null : `${gpu.temperature} °C`],
    ["slowed by", gpu.throttling.length ? gpu.throttling.join(", ") : null],
    ["ECC errors", gpu.ecc_uncorrected ? `${gpu.ecc_uncorrected}` : null],
    ["tasks done", gpu.tasks_done.toLocaleString()],
    ["computed for", span(gpu.busy_seconds)],
    ["canary", gpu.canary_at === null ? null : `right ${span(Math.max(status.now - gpu.canary_at, 0))} ago`],
  ];
  const shown = toggled.get(gpu.gpu_id) ?? (open || isBad(gpu));
  const toggle = () => toggled.set(gpu.gpu_id, !shown);
  const summary = make("summary", { click: toggle, "data-key": `card ${gpu.gpu_id}` },
    make("h3", {}, `${gpu.name} `, make("span", { class: "note" }, gpu.vram ? `${gpu.vram} GB` : "")),
    state(kind, gpu.state), make("div", { class: "mono note" }, gpu.gpu_id));
  const made = make("details", shown ? { open: "" } : {}, summary);
  if (gpu.steps) made.append(make("progress", { max: gpu.steps, value: gpu.step ?? 0, "aria-label": "Steps" }));
  if (total)
    made.append(make("meter", { max: total, value: total - memory.free, "aria-label": "VRAM in use" }));
  made.append(make("dl", {}, ...facts.filter(([, value]) => value !== null)
    .flatMap(([word, value]) => [make("dt", {}, word), make("dd", {}, value)])));
  if (gpu.problem) made.append(make("p", {}, state("bad", gpu.problem)));
  // A pipeline is named by its model, and behind that by what makes it another one of the same.
  const warm = [...new Set(gpu.warm.map((each) => each.split("|")[0]))];
  made.append(make("p", { class: "warmth" }, warm.length ? `Warm: ${warm.join(", ")}` : "Nothing is warm."));
  return make("article", { class: `tile ${kind}` }, made);
}

/** `where` tells it from other links to the same task. */
const link = (task, openStory, where) => make("button", {
  type: "button", class: "link mono", title: task, "data-key": `${where} ${task}`, click: () => openStory(task),
}, short(task));

function outcome(task) {
  if (isOpen(task)) return state("busy", task.progress);
  const good = task.outcome.startsWith("End") && task.fault === null && task.payment !== "0";
  return state(good ? "good" : "bad", task.outcome);
}

function showTasks(status, openStory) {
  const which = by("tasks-which").value;
  const wanted = (task) => which === "all" || (which === "open" ? isOpen(task)
    : !isOpen(task) && task.payment === "0");
  const rows = status.tasks.filter(wanted).map((task) => [
    link(task.commitment, openStory, "tasks"), task.type, outcome(task), task.action, task.gpu_id ?? "",
    clock(task.seen_at), { number: ((task.closed_at ?? status.now) - task.seen_at).toFixed(1) },
    { number: task.payment === "0" ? "" : money(task.payment) },
  ]);
  fill("tasks", rows, which === "all" ? "No task yet." : "None.");
}

function showAccounts(status, openStory) {
  by("classes").replaceChildren(...status.fleet.classes.map((each) =>
    make("article", { class: `tile ${each.stopped ? "bad" : "good"}` },
      make("h3", {}, `${each.name} `, make("span", { class: "note" }, `${each.vram} GB`)),
      each.stopped ? state("bad", "stopped: an account was slashed")
        : state("good", each.least === 1 ? "1 account wanted" : `${each.least} accounts wanted`),
      make("p", { class: "note" }, `${each.slots} for each card`))));
  const plan = [...status.fleet.plan.map((each) => `to do: ${each}`), ...status.fleet.limits.map((each) => `limit: ${each}`)];
  if (plan.length)
    by("classes").append(make("article", { class: "tile warn" }, make("h3", {}, "Plan"),
      make("ul", {}, ...plan.map((each) => make("li", {}, each)))));
  by("accounts-fold").hidden = status.accounts.length <= MANY;
  by("accounts-count").textContent = status.accounts.length;
  const folded = status.accounts.length > MANY && !by("accounts-all").checked;
  const shown = folded ? status.accounts.filter((each) => !serves(each) && !isSpare(each)) : status.accounts;
  fill("accounts", shown.map((each) => [
    { number: `${each.index}` }, make("span", { class: "mono address", title: each.address }, each.address),
    isSpare(each) ? make("span", { class: "note" }, "spare")
      : state(ACCOUNT_KIND[each.status] ?? "warn", each.status.replaceAll("_", " ")),
    each.gpu_class ? `${each.gpu_class.name} ${each.gpu_class.vram} GB` : "",
    { number: money(each.stake, 0) }, { number: money(each.balance) }, { number: `${each.qos}` },
    each.current_task ? link(each.current_task, openStory, each.address) : "",
  ]), folded ? "Every account serves." : "No account is there.");
}

function showNetwork(status) {
  const endpoints = status.chain.endpoints.map((each) => [
    each.name, each.problem ? state("bad", each.problem) : state("good", "well"),
    { number: each.seconds === null ? "" : (each.seconds * 1000).toFixed(0) },
    { number: each.head === null ? "" : each.head.toLocaleString() },
  ]);
  endpoints.push(["relay", status.relay.reached ? state("good", "well")
    : state("bad", status.relay.error ?? "not reached"), { number: "" }, { number: "" }]);
  fill("endpoints", endpoints);
  fill("stores", status.stores.map((each) => [
    short(each.ray_node), { number: `${each.models}` },
    bytes(each.used_bytes) + (each.quota_bytes === null ? "" : ` of ${bytes(each.quota_bytes)}`),
    each.downloads.map(download).join("; ") + (each.queued ? ` and ${each.queued} wait` : ""),
    Object.entries(each.failed).map(([model, why]) => `${model}: ${why}`).join("; "),
  ]), "No model store is there.");
}

function download(each) {
  const done = each.total_bytes ? `${Math.floor(100 * each.done_bytes / each.total_bytes)} %` : bytes(each.done_bytes);
  return `${each.model} ${done} from ${each.source}, ${bytes(each.bytes_per_second)}/s`
    + (each.seconds_left == null ? "" : `, ${span(each.seconds_left)} left`);
}

/** Earnings in words, and by class. */
export function showEarnings(found) {
  by("earnings-sum").textContent = `${money(found.paid)} CNX by ${found.tasks.toLocaleString()} tasks, `
    + `${money(found.gas, 6)} CNX of gas.`;
  fill("by-class", found.classes.map((each) => [
    each.name ? `${each.name} ${each.vram} GB` : "of no class", { number: each.tasks.toLocaleString() },
    { number: money(each.paid) }, { number: money(each.gas, 6) },
  ]));
  return found.steps.map((each) => ({ since: each.since, tasks: each.tasks, paid: cnx(each.paid), gas: cnx(each.gas) }));
}

export function showAudit(found, none = "Nothing was done yet.") {
  fill("audit", found.map((each) => [
    new Date(each.at * 1000).toLocaleString(), each.who,
    [each.action.replaceAll("_", " "), ...Object.values(each.arguments).filter((value) => value !== "" && value !== false)].join(" "),
    each.outcome,
  ]), none);
}
