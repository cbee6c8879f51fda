// Elements of the page, made from text alone: nothing that came from outside is ever read as HTML.

const SVG = "http://www.w3.org/2000/svg";

export const byId = (id) => document.getElementById(id);

/** An element. `attributes` that are functions are listeners; `class` and the like are attributes. */
export function make(tag, attributes = {}, ...children) {
  return filled(document.createElement(tag), attributes, children);
}

export function makeSvg(tag, attributes = {}, ...children) {
  return filled(document.createElementNS(SVG, tag), attributes, children);
}

function filled(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") element.addEventListener(name, value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value != null) element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

/** Give an element the colour of a level, as a custom property that the style sheet uses. */
export function colour(element, index) {
  element.style.setProperty("--of-level", `var(--level-${index % 5})`);
  return element;
}

/** A table: `head` is a list of texts, `rows` of lists of texts or elements; the first cell heads its row. */
export function table(caption, head, rows) {
  const place = (at) => (at ? "number" : null);
  return make("table", {},
    make("caption", { class: "hidden" }, caption),
    make("thead", {}, make("tr", {}, ...head.map((text, at) => make("th", { scope: "col", class: place(at) }, text)))),
    make("tbody", {}, ...rows.map((cells) => make("tr", {}, ...cells.map((cell, at) => make(
      at ? "td" : "th", at ? { class: place(at) } : { scope: "row" }, ...[cell].flat(),
    ))))));
}

export const percent = (share) => `${(100 * share).toFixed(1)} %`;
