// Tabs as the ARIA authoring practices have them: arrow keys, Home and End move and choose.

export function startTabs(list) {
  const tabs = [...list.querySelectorAll("[role=tab]")];

  function choose(tab) {
    for (const each of tabs) {
      const isChosen = each === tab;
      each.setAttribute("aria-selected", isChosen);
      each.tabIndex = isChosen ? 0 : -1;
      document.getElementById(each.getAttribute("aria-controls")).hidden = !isChosen;
    }
  }

  for (const tab of tabs) tab.addEventListener("click", () => choose(tab));
  list.addEventListener("keydown", (event) => {
    const here = tabs.indexOf(document.activeElement), last = tabs.length - 1;
    const places = { ArrowLeft: here - 1, ArrowRight: here + 1, Home: 0, End: last };
    if (!(event.key in places)) return;
    event.preventDefault();
    const tab = tabs[(places[event.key] + tabs.length) % tabs.length];
    choose(tab);
    tab.focus();
  });
}
