// Earnings as bars: an SVG with a title for each bar, and axes with few labels.

const SVG = "http://www.w3.org/2000/svg";
const HEIGHT = 220, LEFT = 64, BOTTOM = 24, TOP = 10, LABEL = 110;

function element(name, attributes, text) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

/** A round number at or above `most`, to end an axis at. */
export function ceiling(most) {
  if (!(most > 0)) return 1;
  const power = 10 ** Math.floor(Math.log10(most));
  return [1, 2, 2.5, 5, 10].map((each) => each * power).find((each) => each >= most * 0.999);
}

/** `steps`: {since, tasks, paid, gas} in CNX; `label` names a step by its time; `width` is in pixels, so that what is
 * written is as large as all else. */
export function plot(steps, label, width) {
  const top = ceiling(Math.max(...steps.map((each) => Math.max(each.paid, each.gas)), 0));
  const total = steps.reduce((sum, each) => sum + each.paid, 0);
  const svg = element("svg", {
    viewBox: `0 0 ${width} ${HEIGHT}`, role: "img",
    "aria-label": `Earnings: ${steps.length} bars, ${total.toFixed(2)} CNX in all`,
  });
  const height = HEIGHT - BOTTOM - TOP;
  const y = (value) => TOP + height * (1 - value / top);
  for (const part of [0, 0.5, 1]) {
    const at = y(top * part);
    svg.append(element("line", { x1: LEFT, x2: width, y1: at, y2: at }));
    svg.append(element("text", { x: LEFT - 6, y: at + 4, "text-anchor": "end" },
      Number((top * part).toPrecision(3)).toLocaleString()));
  }
  const wide = (width - LEFT) / Math.max(steps.length, 1);
  const every = Math.ceil(steps.length * LABEL / (width - LEFT));
  steps.forEach((each, index) => {
    const x = LEFT + index * wide, group = element("g", {});
    group.append(element("title", {},
      `${label(each.since)}: ${each.paid.toFixed(4)} CNX by ${each.tasks} tasks, gas ${each.gas.toFixed(4)}`));
    group.append(element("rect", { x, y: TOP, width: wide, height, fill: "transparent" }));
    group.append(element("rect", { class: "bar", x: x + wide * 0.1, width: Math.max(wide * 0.55, 1),
      y: y(each.paid), height: TOP + height - y(each.paid) }));
    group.append(element("rect", { class: "gas", x: x + wide * 0.67, width: Math.max(wide * 0.23, 0.6),
      y: y(each.gas), height: TOP + height - y(each.gas) }));
    svg.append(group);
    if (index % every === 0 && x + LABEL / 2 < width)
      svg.append(element("text", { x, y: HEIGHT - 6 }, label(each.since)));
  });
  return svg;
}
