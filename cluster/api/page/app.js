// The live page: a state, then what has changed of it again and again, and what an operator may have done. No build step, nothing
// from elsewhere. The token, where one is needed, stays in this tab.

import { by, clock } from "./dom.js";
import { plot } from "./plot.js";
import { showStory, storyProblem } from "./story.js";
import { show, showAudit, showEarnings } from "./views.js";

const TOKEN = "crynux-token", RELOADED = "crynux-reloaded";
const RETRY_SECONDS = 3, QUIET_SECONDS = 15, EARNINGS_SECONDS = 60, RELOAD_SECONDS = 600;
let last = null, heard = 0, alive = 0, stream = null, held = [], version = null, asking = 0, range = { days: "1", step: "hour" };

class Refused extends Error {}

/** Ask the API; raises `Refused` where a token is needed, `Error` with its own words otherwise. */
async function ask(path, options = {}) {
  const headers = { ...options.headers }, token = sessionStorage.getItem(TOKEN);
  if (token) headers.authorization = `Bearer ${token}`;
  const answer = await fetch(path, { ...options, headers, cache: "no-store" });
  if (answer.ok) return answer;
  const said = await answer.json().catch(() => ({}));
  const words = typeof said.detail === "string" ? said.detail : said.text ?? `HTTP ${answer.status}`;
  if (answer.status === 401) throw new Refused(words);
  throw new Error(words);
}

const json = async (path) => (await ask(path)).json();

// --- the stream ----------------------------------------------------------------------------------

/** Read server-sent events by fetch: EventSource can't send a token. */
async function follow() {
  stream?.abort();
  const mine = stream = new AbortController();
  while (!mine.signal.aborted) {
    try {
      alive = Date.now();
      const answer = await ask("v1/events", { signal: mine.signal });
      hideToken();
      const began = Date.now();
      await read(answer.body.pipeThrough(new TextDecoderStream()).getReader());
      // None goes on for ever: one that has lasted is followed by the next.
      if (Date.now() - began > RETRY_SECONDS * 1000) continue;
      say("The stream has ended; connecting again…");
    } catch (error) {
      if (mine.signal.aborted) return;
      if (error instanceof Refused) {
        stream = null;
        say("a token is needed");
        return wantToken(error.message);
      }
      say(`Not connected: ${error.message}`);
    }
    await new Promise((done) => setTimeout(done, RETRY_SECONDS * 1000));
  }
}

async function read(reader) {
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    // Also a part of an event: on a slow line a large one is long in coming.
    alive = Date.now();
    text += value;
    for (let end = text.indexOf("\n\n"); end >= 0; end = text.indexOf("\n\n")) {
      take(text.slice(0, end));
      text = text.slice(end + 2);
    }
  }
}

function take(event) {
  const part = (name) => event.split("\n").find((line) => line.startsWith(`${name}: `))?.slice(name.length + 2);
  const data = JSON.parse(part("data") ?? "null");
  heard = Date.now();
  if (part("event") === "away") return say(data);
  last = part("event") === "status" ? data : { ...last, ...data };
  if (isOld()) return location.reload();
  const sign = last.drain.everything ? "!" : "✕";
  const words = last.ready ? "✓ serving" : `${sign} not serving: ${last.missing.join("; ")}`;
  const failed = draw(Object.keys(data));
  say(failed.length ? `${words} – this page can't show ${failed.join("; ")}` : words);
}

/** Whether another version answers than this script came with; never twice within a while: two may answer by turns. */
function isOld() {
  version ??= last.version;
  if (version === last.version || Date.now() - Number(sessionStorage.getItem(RELOADED)) < RELOAD_SECONDS * 1000) return false;
  sessionStorage.setItem(RELOADED, `${Date.now()}`);
  return true;
}

/** Returns what couldn't be drawn. */
function draw(changed) {
  const { back, failed } = show(last, openStory, changed);
  held = back;
  sayFresh();
  return failed;
}

function say(words) {
  if (by("state").textContent !== words) by("state").textContent = words;
}

function sayFresh() {
  if (last === null) return;
  const old = (Date.now() - heard) / 1000 > QUIET_SECONDS;
  by("fresh").textContent = `as of ${clock(last.now)}${old ? " – no news since" : ""}`
    + (held.length ? ` – held while text is marked: ${held.join(", ")}` : "");
}

/** A connection can be lost without ending: the server has something to say every few seconds. */
function watch() {
  sayFresh();
  if (stream === null || Date.now() - alive <= QUIET_SECONDS * 1000) return;
  say(`No news ${last === null ? "yet" : `since ${clock(last.now)}`}; connecting again…`);
  follow();
}

setInterval(watch, 1000);

// --- the token -----------------------------------------------------------------------------------

function wantToken(words) {
  const had = sessionStorage.getItem(TOKEN) !== null;
  sessionStorage.removeItem(TOKEN);
  by("token").hidden = false;
  by("token-problem").textContent = had ? `It was refused: ${words}` : "";
  by("secret").focus();
}

function hideToken() {
  by("token").hidden = true;
  by("secret").value = "";
}

by("token").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(TOKEN, by("secret").value.trim());
  start();
});

// --- stories, earnings, actions ------------------------------------------------------------------

async function openStory(name) {
  try {
    const blob = async (path) => (await ask(path)).blob();
    showStory(await json(`v1/tasks/${encodeURIComponent(name)}`), blob);
    history.replaceState(null, "", `#task=${encodeURIComponent(name)}`);
  } catch (error) {
    storyProblem(error.message);
  }
}

by("story").addEventListener("close", () => history.replaceState(null, "", location.pathname));
for (const [id, field] of [["tasks-which", "tasks"], ["accounts-all", "accounts"]])
  by(id).addEventListener("change", () => {
    // Who asks for other rows marks those no more.
    getSelection().empty();
    if (last !== null) draw([field]);
  });
by("tasks-open").addEventListener("click", () => by("tasks-find").value.trim() && openStory(by("tasks-find").value.trim()));
by("tasks-find").addEventListener("keydown", (event) => {
  if (event.key === "Enter") by("tasks-open").click();
});

async function earnings() {
  // Another range may be asked for meanwhile, and its answer be there first.
  const { days, step } = range, mine = ++asking;
  try {
    const found = await json(`v1/earnings?days=${days}&step=${step}`);
    if (mine !== asking) return;
    const hours = Number(days) <= 1, daily = step === "day";
    const label = (since) => new Date(since * 1000).toLocaleString(undefined, daily || !hours
      // A day is UTC's: west of Greenwich it begins on the day before.
      ? { month: "short", day: "numeric", ...(daily ? { timeZone: "UTC" } : { hour: "2-digit" }) }
      : { hour: "2-digit", minute: "2-digit" });
    by("plot").replaceChildren(plot(showEarnings(found), label, Math.max(by("plot").clientWidth - 16, 280)));
  } catch (error) {
    if (mine !== asking) return;
    by("earnings-sum").textContent = `Not known now: ${error.message}`;
  }
}

for (const button of document.querySelectorAll("[data-days]"))
  button.addEventListener("click", () => {
    range = { days: button.dataset.days, step: button.dataset.step };
    for (const each of document.querySelectorAll("[data-days]"))
      each.setAttribute("aria-pressed", String(each === button));
    earnings();
  });

/** Where anyone may read, only who acts is asked for a token, and sees who did. */
async function audit() {
  try {
    showAudit(await json("v1/audit?limit=20"));
  } catch (error) {
    showAudit([], `Not shown: ${error.message}`);
  }
}

for (const button of document.querySelectorAll("[data-act]"))
  button.addEventListener("click", async () => {
    if (button.dataset.ask && !confirm(button.dataset.ask)) return;
    button.disabled = true;
    try {
      const answer = await ask("v1/actions", {
        method: "POST", body: button.dataset.act, headers: { "content-type": "application/json" },
      });
      by("action-said").textContent = (await answer.json()).text;
    } catch (error) {
      by("action-said").textContent = `Not done: ${error.message}`;
      if (error instanceof Refused) wantToken(error.message);
    }
    button.disabled = false;
    audit();
  });

// --- begin ---------------------------------------------------------------------------------------

function start() {
  follow();
  earnings();
  audit();
  const named = /^#task=([0-9a-zA-Z]+)$/.exec(location.hash);
  if (named) openStory(named[1]);
}

setInterval(earnings, EARNINGS_SECONDS * 1000);
start();
