"use strict";
// Text of the corpus is only ever set as textContent, so it cannot become markup.
const {table, latents, chunk} = window.SAE;
const columns = Object.keys(table.columns);
const SHOWN = 100;
const logarithmic = new Set(["frequency", "firings", "maximum", "mean"]);
let rows = [], sorted = {name: "maximum", down: true}, page = 0, current = null;

const $ = id => document.getElementById(id);
const value = (name, row) => table.columns[name][row];
const format = x => x === null ? "–" : Number.isInteger(x) ? String(x) : x.toPrecision(3);

function element(tag, text, attributes = {}) {
  const made = document.createElement(tag);
  if (text !== null && text !== undefined) made.textContent = text;
  for (const [name, content] of Object.entries(attributes)) made.setAttribute(name, content);
  return made;
}

// The table: what is searched for, in which order, a page at a time.

function matching(query) {
  const conditions = [], words = [];
  const parts = query.match(/[a-z_0-9.]+\s*[<>=]\s*-?[\d.e+-]+|\S+/gi) || [];
  for (const part of parts) {
    const found = part.match(/^([a-z_0-9.]+)\s*([<>=])\s*(-?[\d.e+-]+)$/i);
    if (found && found[1] in table.columns) conditions.push([found[1], found[2], Number(found[3])]);
    else words.push(part.toLowerCase());
  }
  return row => conditions.every(([name, sign, bound]) => {
    const x = value(name, row);
    if (x === null) return false;
    return sign === "<" ? x < bound : sign === ">" ? x > bound : x === bound;
  }) && words.every(word =>
    String(table.latent[row]) === word ||
    table.tokens[row].some(token => token.trim().toLowerCase() === word) ||
    (word.length > 2 && table.tokens[row].some(token => token.toLowerCase().includes(word))));
}

function select() {
  const wanted = matching($("query").value);
  rows = table.latent.map((_, row) => row).filter(wanted);
  const sign = sorted.down ? -1 : 1;
  const key = sorted.name === "latent" ? row => table.latent[row] : row => value(sorted.name, row);
  rows.sort((a, b) => {
    const x = key(a), y = key(b);
    if (x === null || y === null) return (x === null) - (y === null);
    return sign * (x - y) || a - b;
  });
  page = 0;
  $("count").textContent = `${rows.length} of ${table.latent.length} latents`;
  showTable();
  drawPlot();
}

function heading(name) {
  const cell = element("th", null, {scope: "col"});
  if (name === "fires on") {
    cell.className = "words";
    cell.textContent = name;
    return cell;
  }
  const button = element("button", name.replaceAll("_", " "), {type: "button"});
  button.addEventListener("click", () => {
    sorted = {name, down: sorted.name === name ? !sorted.down : true};
    select();
  });
  if (sorted.name === name) {
    cell.setAttribute("aria-sort", sorted.down ? "descending" : "ascending");
    button.textContent += sorted.down ? " ↓" : " ↑";
  }
  cell.append(button);
  return cell;
}

function showTable() {
  const shown = ["latent", "fires on", ...columns];
  const head = element("tr");
  head.append(...shown.map(heading));
  $("table").tHead.replaceChildren(head);
  $("table").tBodies[0].replaceChildren(...rows.slice(page * SHOWN, (page + 1) * SHOWN).map(row => {
    const line = element("tr");
    const number = element("td");
    number.append(element("a", table.latent[row], {href: `#${table.latent[row]}`}));
    const words = element("td", null, {class: "words"});
    for (const token of table.tokens[row].slice(0, 3)) words.append(tokenOf(token), " ");
    line.append(number, words, ...columns.map(name => element("td", format(value(name, row)))));
    if (table.latent[row] === current) line.setAttribute("aria-current", "true");
    return line;
  }));
  $("back").disabled = page === 0;
  $("on").disabled = (page + 1) * SHOWN >= rows.length;
}

const visible = text => text.replaceAll("\n", "↵").replaceAll("\t", "⇥");
const tokenOf = text => element("span", visible(text), {class: "token"});

// The plot of all latents that the table lists.

const margin = {left: 60, right: 10, top: 10, bottom: 34};
let points = [];

function scale(name, from, to) {
  const log = logarithmic.has(name);
  const of = x => log ? (x > 0 ? Math.log10(x) : NaN) : x;
  const all = rows.map(row => value(name, row)).filter(x => x !== null).map(of).filter(Number.isFinite);
  let low = all.reduce((a, b) => Math.min(a, b), Infinity);
  let high = all.reduce((a, b) => Math.max(a, b), -Infinity);
  if (!(high > low)) { low -= .5; high += .5; }
  const place = x => x === null ? NaN : from + (of(x) - low) / (high - low) * (to - from);
  return {place, low, high, log};
}

function drawPlot() {
  const canvas = $("plot"), draw = canvas.getContext("2d");
  const ink = getComputedStyle(document.body).color;
  const x = scale($("x").value, margin.left, canvas.width - margin.right);
  const y = scale($("y").value, canvas.height - margin.bottom, margin.top);
  draw.clearRect(0, 0, canvas.width, canvas.height);
  draw.fillStyle = ink;
  draw.font = "12px system-ui, sans-serif";
  const label = (axis, share) => {
    const at = axis.low + share * (axis.high - axis.low), x = axis.log ? 10 ** at : at;
    return x !== 0 && Math.abs(x) < 1e-3 ? x.toExponential(1) : x.toPrecision(2);
  };
  for (const share of [0, .25, .5, .75, 1]) {
    const across = margin.left + share * (canvas.width - margin.left - margin.right);
    const up = canvas.height - margin.bottom - share * (canvas.height - margin.top - margin.bottom);
    draw.textAlign = share === 1 ? "right" : "center";
    draw.fillText(label(x, share), across, canvas.height - 18);
    draw.textAlign = "right";
    draw.fillText(label(y, share), margin.left - 6, up + 4);
  }
  draw.textAlign = "center";
  draw.fillText($("x").value.replaceAll("_", " "), canvas.width / 2, canvas.height - 3);
  points = rows.map(row => ({row, x: x.place(value($("x").value, row)), y: y.place(value($("y").value, row))}))
    .filter(point => Number.isFinite(point.x) && Number.isFinite(point.y));
  draw.fillStyle = "#7570b388";
  for (const point of points) draw.fillRect(point.x - 1.5, point.y - 1.5, 3, 3);
  const chosen = points.find(point => table.latent[point.row] === current);
  if (chosen) {
    draw.strokeStyle = "#d95f02";
    draw.lineWidth = 2;
    draw.beginPath();
    draw.arc(chosen.x, chosen.y, 6, 0, 7);
    draw.stroke();
  }
}

function nearest(event) {
  const canvas = $("plot"), box = canvas.getBoundingClientRect();
  const x = (event.clientX - box.left) * canvas.width / box.width;
  const y = (event.clientY - box.top) * canvas.height / box.height;
  let best = null, least = 20 ** 2;
  for (const point of points) {
    const distance = (point.x - x) ** 2 + (point.y - y) ** 2;
    if (distance < least) { least = distance; best = point; }
  }
  return best;
}

$("plot").addEventListener("mousemove", event => {
  const point = nearest(event);
  $("pointed").textContent = point === null ? "" :
    `latent ${table.latent[point.row]}: ${table.tokens[point.row].slice(0, 3).map(visible).join("  ")}`;
});
$("plot").addEventListener("click", event => {
  const point = nearest(event);
  if (point !== null) location.hash = table.latent[point.row];
});

// One latent. Its data are a script of their own, so that they load from the disk, too.

function load(latent, then) {
  if (latent in latents) return then(latents[latent]);
  const source = element("script", null, {src: `latents/${Math.floor(latent / chunk)}.js`});
  source.addEventListener("load", () => then(latents[latent]));
  source.addEventListener("error", () =>
    $("latent").replaceChildren(element("p", `The file ${source.getAttribute("src")} is missing.`)));
  document.head.append(source);
}

function histogram(counts, maximum) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", `0 0 ${counts.length * 10} 100`);
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", `Histogram of activations from 0 to ${format(maximum)}, heights in the logarithm`);
  const top = Math.log1p(Math.max(...counts, 1));
  counts.forEach((count, i) => {
    const bar = document.createElementNS("http://www.w3.org/2000/svg", "rect");
    const height = 100 * Math.log1p(count) / top;
    const place = {x: i * 10 + 1, y: 100 - height, width: 8, height, fill: "#7570b3"};
    for (const [name, content] of Object.entries(place)) bar.setAttribute(name, content);
    const range = [i, i + 1].map(edge => format(edge / counts.length * maximum)).join(" to ");
    const title = document.createElementNS("http://www.w3.org/2000/svg", "title");
    title.textContent = `${range}: ${Math.round(count)}`;
    bar.append(title);
    svg.append(bar);
  });
  return svg;
}

function context(one, maximum) {
  const line = element("p", null, {class: "context"});
  one.tokens.forEach((token, i) => {
    const share = one.shares[i] / 255;
    const span = element("span", visible(token), {title: format(share * maximum)});
    span.style.background = `rgba(217, 95, 2, ${share.toFixed(2)})`;
    if (i === one.at) span.className = "here";
    line.append(span);
  });
  return line;
}

function list(title, entries, cell) {
  const box = element("div");
  const lines = element("table");
  for (const [what, number] of entries) {
    const line = element("tr"), first = element("td");
    first.append(cell(what));
    line.append(first, element("td", format(number)));
    lines.append(line);
  }
  box.append(element("h3", title), lines);
  return box;
}

const link = latent => element("a", latent, {href: `#${latent}`});

function show() {
  const latent = Number(location.hash.slice(1)), row = table.latent.indexOf(latent);
  if (!location.hash || row < 0) return;
  current = latent;
  load(latent, data => {
    const panel = $("latent"), maximum = value("maximum", row);
    const facts = element("div", null, {class: "facts"});
    for (const name of columns) {
      const fact = element("div");
      fact.append(element("span", name.replaceAll("_", " ")), element("b", format(value(name, row))));
      facts.append(fact);
    }
    const lists = element("div", null, {class: "lists"});
    lists.append(list("Fires on, by total activation; times", data.fires_on, tokenOf));
    if (data.raised) lists.append(list("Raises the logits of", data.raised, tokenOf), list("Lowers the logits of", data.lowered, tokenOf));
    lists.append(list("Nearest decoder rows, cosine", data.neighbours, link), list("Fires together with, times", data.partners, link));
    panel.replaceChildren(element("h2", `Latent ${latent}`), facts,
      element("h3", "Activations where it fires"), histogram(data.histogram, maximum), lists);
    let interval = null;
    for (const one of data.contexts) {
      if (one.interval !== interval) {
        interval = one.interval;
        panel.append(element("h3", interval === 0 ? "Strongest contexts" :
          `Drawn from activations of ${format(maximum / 2 ** interval)} to ${format(maximum / 2 ** (interval - 1))}`));
      }
      panel.append(context(one, maximum));
    }
    if (!data.contexts.length) panel.append(element("p", "It never fired on this text."));
    panel.focus({preventScroll: window.innerWidth > 960});
    showTable();
    drawPlot();
  });
}

document.addEventListener("keydown", event => {
  const step = {ArrowRight: 1, ArrowLeft: -1}[event.key];
  if (!step || /INPUT|SELECT/.test(event.target.tagName) || current === null) return;
  const at = rows.findIndex(row => table.latent[row] === current);
  const next = rows[at + step];
  if (next !== undefined) location.hash = table.latent[next];
});
for (const id of ["x", "y"]) {
  for (const name of columns) $(id).append(element("option", name.replaceAll("_", " "), {value: name}));
  $(id).addEventListener("change", drawPlot);
}
$("x").value = "projection" in table.columns ? "projection" : columns[0];
$("y").value = "frequency";
$("query").addEventListener("input", select);
$("search").addEventListener("submit", event => event.preventDefault());
$("back").addEventListener("click", () => { page -= 1; showTable(); });
$("on").addEventListener("click", () => { page += 1; showTable(); });
window.addEventListener("hashchange", show);
select();
show();
