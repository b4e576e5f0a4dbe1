// A task's whole story, in a dialog.

import { by, bytes, date, make, money, pairs, short, span, state } from "./dom.js";

/** `ask` fetches a path of the API as a blob. */
export function showStory(found, ask) {
  by("story-title").textContent = `Task ${short(found.commitment)}`;
  const good = found.outcome !== null && found.fault === null && found.payment !== "0";
  const kind = found.outcome === null ? "busy" : good ? "good" : "bad";
  by("story-body").replaceChildren(
    make("p", {}, state(kind, found.outcome ?? found.progress), found.fault ? ` – ${found.fault}` : ""),
    make("p", { class: "mono note" }, found.commitment),
    make("dl", { class: "glance" }, ...pairs([
      ["type", found.type], ["account", make("span", { class: "mono", title: found.account }, short(found.account))],
      ["fee", `${money(found.fee)} CNX`], ["paid", `${money(found.payment)} CNX`],
      ["seen", date(found.seen_at)], ["closed", found.closed_at === null ? null : date(found.closed_at)],
      ["what it needed lay", found.tier],
      ["score", found.score === null ? null : make("span", { class: "mono", title: found.score }, short(found.score))],
    ])),
    make("p", { class: "note" }, found.models.join(", ")),
    ...stages(found.stages),
    make("h3", {}, "What happened"), table(["At", "What", "GPU"],
      found.events.map((each) => [date(each.at), each.text, each.gpu ?? ""])),
    ...part("Attempts", ["Attempt", "GPU", "Took", "Came to"], found.attempts.map((each) => [
      each.attempt, each.gpu, each.ended_at === null ? "" : span(each.ended_at - each.started_at),
      each.fault ? state("bad", `${each.fault}: ${each.detail}`) : each.ended_at === null ? state("busy", "computing") : state("good", "a result"),
    ])),
    ...part("Transactions", ["What", "State", "Nonce", "Hash", "Block", "Gas CNX", "Why"], found.transactions.map((each) => [
      each.write, each.state, each.nonce === null ? "" : `${each.nonce}`, hash(each),
      each.block === null ? "" : `${each.block}`, money(each.cost, 6), each.reason,
    ])),
    ...part("Files", ["Name", "Size", "SHA-256"], found.files.map((each) => [
      each.name, bytes(each.size), make("span", { class: "mono" }, each.sha256)])),
    pictures(found, ask),
    found.bundles.length ? make("p", { class: "note" },
      `A bundle is kept of its failed attempts: crynux-cluster tasks ${found.commitment.slice(2, 18)} --bundle`) : "",
  );
  if (!by("story").open) by("story").showModal();
}

/** Thumbnails of the result while it is kept; shown on demand, since they are somebody's. */
function pictures(found, ask) {
  const kept = found.files.filter((file) => file.kept && file.name.endsWith(".png"));
  if (!kept.length) return "";
  const box = make("div", { class: "pictures" });
  const button = make("button", { type: "button", click: async () => {
    let failed = false;
    button.disabled = true;
    while (button.nextSibling) button.nextSibling.remove();
    for (const file of kept) {
      try {
        const data = await ask(`v1/tasks/${found.commitment}/files/${encodeURIComponent(file.name)}`);
        const url = URL.createObjectURL(data);
        const picture = make("img", { src: url, alt: `Result ${file.name}` });
        picture.addEventListener("load", () => URL.revokeObjectURL(url));
        box.append(picture);
      } catch (error) {
        box.append(make("p", { role: "alert" }, `${file.name}: ${error.message}`));
        failed = true;
      }
    }
    // What couldn't be had may be asked for again.
    button.disabled = !failed;
  } }, "Show the result");
  box.append(button);
  return box;
}

export function storyProblem(text) {
  by("story-title").textContent = "No story";
  by("story-body").replaceChildren(make("p", { role: "alert" }, text));
  if (!by("story").open) by("story").showModal();
}

function hash(each) {
  if (each.tx_hash === null) return "";
  const text = make("span", { class: "mono", title: each.tx_hash }, short(each.tx_hash));
  const known = each.link !== null && /^https?:\/\//.test(each.link);
  return known ? make("a", { href: each.link, rel: "noreferrer noopener", target: "_blank" }, text) : text;
}

function stages(found) {
  const entries = Object.entries(found), most = Math.max(...entries.map(([, seconds]) => seconds), 0);
  if (!entries.length) return [];
  return [make("h3", {}, "How long each stage took"), make("div", { class: "stages" }, ...entries.flatMap(([name, seconds]) => [
    make("span", {}, name.replaceAll("_", " ")),
    make("meter", { min: 0, max: most || 1, value: seconds, "aria-label": `${name}: ${span(seconds)}` }),
    make("span", { class: "number" }, span(seconds)),
  ]))];
}

const part = (title, heads, rows) => rows.length ? [make("h3", {}, title), table(heads, rows)] : [];

const table = (heads, rows) => make("div", { class: "scroll" }, make("table", {},
  make("thead", {}, make("tr", {}, ...heads.map((head) => make("th", { scope: "col" }, head)))),
  make("tbody", {}, ...rows.map((row) => make("tr", {}, ...row.map((value) => make("td", {}, value)))))));
