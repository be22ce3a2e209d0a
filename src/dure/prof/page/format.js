"use strict";
// Numbers as text, elements, and colours.

const PALETTE = ["#4c78a8", "#f58518", "#54a24b", "#b279a2", "#72b7b2", "#9d755d", "#d8a518",
  "#e377c2", "#7f8fa9", "#17a2b8", "#8c6bb1", "#a0b830"];
const PATH = { compute: "#54a24b", transfer: "#4c78a8", latency: "#9ecae9", issue: "#72b7b2",
  signal: "#d8a518", launch: "#9aa3af", idle: "#c9ced6" };

function style(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

function si(value, unit) {
  const prefixes = [["P", 1e15], ["T", 1e12], ["G", 1e9], ["M", 1e6], ["k", 1e3], ["", 0]];
  const [prefix, size] = prefixes.find(([, s]) => value >= s);
  return `${digits(size ? value / size : value)} ${prefix}${unit}`.trim();
}

function digits(value) {
  if (value === 0) return "0";
  return value >= 1000 ? Math.round(value).toLocaleString("en") : String(Number(value.toPrecision(4)));
}

function bytes(value) {
  for (const [unit, size] of [["GiB", 2 ** 30], ["MiB", 2 ** 20], ["KiB", 2 ** 10]]) {
    if (value >= size) return `${digits(value / size)} ${unit}`;
  }
  return `${digits(value)} B`;
}

function time(ps) {
  for (const [unit, size] of [["s", 1e12], ["ms", 1e9], ["µs", 1e6], ["ns", 1e3]]) {
    if (Math.abs(ps) >= size) return `${digits(ps / size)} ${unit}`;
  }
  return `${digits(ps)} ps`;
}

function percent(part) {
  const value = 100 * part;
  return `${value >= 10 || value === 0 ? value.toFixed(1) : value.toPrecision(2)} %`;
}

// An element with attributes and children; texts are never read as HTML.
function make(tag, attributes, ...children) {
  const svg = ["svg", "path", "line", "circle", "text", "rect", "g", "title"].includes(tag);
  const found = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag)
    : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value !== null && value !== undefined) found.setAttribute(name, value);
  }
  for (const child of children.flat(3)) {
    if (child !== null && child !== undefined) found.append(child);
  }
  return found;
}

// Columns: [head, cell of a row, class]; a cell is text or an element.
function grid(columns, rows) {
  const head = columns.map(([name, , kind]) => make("th", { class: kind }, name));
  const body = rows.map((row) => make("tr", {},
    columns.map(([, cell, kind]) => make("td", { class: kind }, cell(row)))));
  return make("div", { class: "scroll" },
    make("table", {}, make("thead", {}, make("tr", {}, head)), make("tbody", {}, body)));
}

// Parts of a whole: [part, colour, what].
function bar(parts) {
  return make("div", { class: "bar" }, parts.filter(([part]) => part > 0).map(([part, color, what]) =>
    make("i", { style: `width:${100 * part}%;background:${color}`, title: `${what}: ${percent(part)}` })));
}

function legend(entries) {
  return make("div", { class: "legend" }, entries.map(([color, text]) => make("span", {},
    make("span", { class: "swatch", style: `background:${color}` }), text)));
}

const tip = {
  show(event, text) {
    const box = document.getElementById("tip");
    box.textContent = text;
    box.style.display = "block";
    const left = Math.min(event.clientX + 14, innerWidth - box.offsetWidth - 8);
    const above = event.clientY + 18 + box.offsetHeight > innerHeight;
    box.style.left = `${Math.max(4, left)}px`;
    box.style.top = `${above ? event.clientY - box.offsetHeight - 10 : event.clientY + 18}px`;
  },
  hide() { document.getElementById("tip").style.display = "none"; },
};
