// Whether the tab should rest, and why: its owner's settings against what the page can see.

/** Whether the minute of the day lies in hours such as "22-7" or "8:30-17"; no hours are always. */
export function inHours(hours, date) {
  if (!hours) return true;
  const match = /^\s*(\d{1,2})(?::(\d\d))?\s*-\s*(\d{1,2})(?::(\d\d))?\s*$/.exec(hours);
  if (!match) return true;
  const minutes = (hour, minute) => Number(hour) * 60 + Number(minute ?? 0);
  const [start, end] = [minutes(match[1], match[2]), minutes(match[3], match[4])];
  const now = date.getHours() * 60 + date.getMinutes();
  return start < end ? now >= start && now < end : now >= start || now < end;
}

/**
 * The reason to rest, for people, or null.
 * facts = { paused, visible, battery, bytes_today }: the person's wish, whether the tab is seen,
 * whether a battery is being used up, bytes sent and received today.
 */
export function reasonToRest(settings, facts, date) {
  if (facts.paused) return "paused by you";
  if (settings.only_visible && !facts.visible) {
    return "this tab is hidden; it goes on when you look at it, or let it work hidden in the settings";
  }
  if (settings.only_mains && facts.battery) {
    return "the battery is in use; it goes on when the charger is plugged in";
  }
  if (!inHours(settings.hours, date)) return `outside the hours that you set (${settings.hours})`;
  if (settings.data_cap_mb !== null && facts.bytes_today >= settings.data_cap_mb * 1e6) {
    return "today's data cap is used up; it goes on at midnight";
  }
  return null;
}
