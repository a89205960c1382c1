"""The template of the page that `tq page` writes: Jinja2 text and its style sheet, nothing else."""

# Each status has one colour wherever it appears, legible on the page's background.
STYLE = """
:root {
  color-scheme: light dark;
  --back: #f5f6f8; --card: #ffffff; --text: #1a1f26; --quiet: #56606c; --line: #d9dde3; --link: #0b57a4;
  --pending: #56606c; --in_progress: #0b62b8; --scheduled: #6a3fb5; --held: #8f5200; --blocked: #6b6000;
  --completed: #2a7230; --failed: #c02020; --handed_over: #00687a; --cancelled: #6b5b57; --expired: #7d4a63;
}
@media (prefers-color-scheme: dark) {
  :root {
    --back: #14171b; --card: #1e2328; --text: #e6e9ed; --quiet: #a4aeb9; --line: #39414a; --link: #86bdf5;
    --pending: #a4aeb9; --in_progress: #6cb2f7; --scheduled: #b79bf0; --held: #eaa64d; --blocked: #cfc14e;
    --completed: #74c47b; --failed: #ff8a80; --handed_over: #5fc4d6; --cancelled: #b8a7a2; --expired: #d79bb8;
  }
}
.pending { --status: var(--pending) } .in_progress { --status: var(--in_progress) }
.scheduled { --status: var(--scheduled) } .held { --status: var(--held) }
.blocked { --status: var(--blocked) } .completed { --status: var(--completed) }
.failed { --status: var(--failed) } .cancelled { --status: var(--cancelled) }
.expired { --status: var(--expired) } .handed_over { --status: var(--handed_over) }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 72rem; padding: 1rem; background: var(--back); color: var(--text);
  font: 1rem/1.45 system-ui, sans-serif }
a { color: var(--link) }
h1 { font-size: 1.5rem; margin: 0 0 .25rem } h2 { font-size: 1.1rem; margin: 0 0 .5rem }
p, dd, dt, pre, code, summary span { overflow-wrap: anywhere }
header p, .quiet { color: var(--quiet); margin: 0; font-size: .875rem }
section, .note { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: 1rem;
  margin: 1rem 0 }
.note { border-left: .375rem solid var(--held) } .note p { margin: 0 }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); gap: .75rem; margin: 1rem 0 }
.tiles a { background: var(--card); border: 1px solid var(--line); border-top: .25rem solid var(--status);
  border-radius: .5rem; padding: .5rem .75rem; text-decoration: none; color: inherit }
.tiles b { display: block; font-size: 1.75rem; line-height: 1.2; font-variant-numeric: tabular-nums }
.tiles .some b, .status { color: var(--status) } .status { font-weight: 600 }
details { border-top: 1px solid var(--line) } h2 + details { border-top: 0 }
summary { display: grid; grid-template-columns: 10rem minmax(14rem, 1fr) 6.5rem 1fr; gap: 0 1rem; padding: .375rem 0; cursor: pointer }
summary:hover { background: var(--back) }
summary .name { color: var(--link) } summary .when { color: var(--quiet) }
details.more > summary { display: block; color: var(--link) }
details[open] { padding-bottom: .75rem }
dl { display: grid; grid-template-columns: minmax(7rem, max-content) 1fr; gap: .125rem 1rem; margin: .25rem 0 }
dt { color: var(--quiet) } dd { margin: 0 }
pre { margin: 0; padding: .5rem .75rem; white-space: pre-wrap; border: 1px solid var(--line); border-radius: .375rem;
  background: var(--back); font-size: .875rem }
h3 { font-size: .875rem; margin: .5rem 0 .25rem; color: var(--quiet) }
table { border-collapse: collapse; width: 100%; font-size: .9375rem }
th, td { text-align: left; vertical-align: top; padding: .375rem .75rem .375rem 0; border-top: 1px solid var(--line) }
td:first-child { overflow-wrap: anywhere; min-width: 9rem }
thead th { border-top: 0; color: var(--quiet); font-weight: 600; font-size: .8125rem }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums } td.number { white-space: nowrap }
td.zero { color: var(--quiet) } tr.total td { font-weight: 600 } tr.type td:first-child { padding-left: 1rem }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(20rem, 100%), 1fr)); gap: 1rem }
.charts section { margin: 0 }
svg { display: block; width: 100%; height: 9rem; border-bottom: 1px solid var(--line) }
svg rect { fill: var(--status) } svg .ground { fill: transparent }
.axis { display: flex; justify-content: space-between; color: var(--quiet); font-size: .8125rem }
.key { display: flex; flex-wrap: wrap; gap: 0 1rem; font-size: .8125rem }
.key span::before { content: "■ "; color: var(--status) }
code { font-size: .9em }
@media (max-width: 62rem) {
  summary { grid-template-columns: 10rem 1fr 6rem } summary .says { grid-column: 1 / -1 }
}
@media (max-width: 44rem) { summary { grid-template-columns: 1fr; gap: 0 } section { padding: .75rem } }
@media (max-width: 68rem) {
  thead { display: none }
  tr { display: block; border-top: 1px solid var(--line); padding: .5rem 0 }
  td, td.number { display: grid; grid-template-columns: 8rem 1fr; gap: .5rem; border: 0; padding: 0; text-align: left;
    white-space: normal }
  tr.type td:first-child { padding-left: 0 } td.zero { display: none }
  td::before { content: attr(data-label); color: var(--quiet); font-weight: 400 }
}
"""

TEMPLATE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'sha256-{{ style_hash }}'; img-src data:">
{% if refresh %}<meta http-equiv="refresh" content="{{ refresh }}">{% endif %}

<link rel="icon" href="data:,">
<title>Task queue</title>
<style>{{ style }}</style>

{% macro task_line(task, with_status) %}
<details class="{{ task.status }}" data-task="{{ task.task_id }}">
<summary><span class="name">{{ task.task_type | breakable }}</span> <span class="about">{{ task.about | breakable }}</span>
<span class="when" title="{{ task.moment }}">{{ task.when }}</span>
<span class="says">{% if with_status %}<b class="status">{{ task.status | word }}</b> {% endif %}{{ task.note | breakable }}</span></summary>
<dl>{% for name, value in task.fields %}<dt>{{ name }}</dt><dd>{{ value | breakable }}</dd>
{% endfor %}</dl>
{% for name, text in task.boxes %}<h3>{{ name }}</h3><pre>{{ text | breakable }}</pre>
{% endfor %}
<p class="quiet"><code>{{ task.command | breakable }}</code> shows it in a terminal.</p>
</details>
{% endmacro %}

{% macro task_lines(part, with_status=false) %}
{% for task in part.shown %}{{ task_line(task, with_status) }}{% endfor %}
{% if part.folded %}<details class="more"><summary>{{ part.folded | length }} more</summary>
{% for task in part.folded %}{{ task_line(task, with_status) }}{% endfor %}
{% if part.more %}<p class="quiet">{{ part.more | breakable }}</p>{% endif %}</details>{% endif %}
{% endmacro %}

{% macro chart(columns, bars, label) %}
<svg viewBox="0 0 {{ bars | length }} 100" preserveAspectRatio="none" role="img" aria-label="{{ label }}">
{% for says, blocks in columns %}{% set x = loop.index0 %}
<g><title>{{ says }}</title><rect class="ground" x="{{ x }}" y="0" width="1" height="100"/>
{% for block in blocks %}<rect class="{{ block.status }}" x="{{ x + 0.08 }}" y="{{ block.y }}" width="0.84" height="{{ block.height }}"/>
{% endfor %}</g>
{% endfor %}
</svg>
<div class="axis"><span>{{ bars[0].since | clock }}</span><span>{{ bars[12].since | clock }}</span>
<span>{{ bars[-1].until | clock }}</span></div>
{% endmacro %}

<header><h1>Task queue</h1>
<p>As of {{ now }}{% if refresh %}, read again every {{ refresh | span }}{% endif %}. All times are {{ zone }}.</p></header>
<main>
{% for note in notes %}<div class="note"><p>{{ note | breakable }}</p></div>
{% endfor %}

<div class="tiles">
{% for status, tasks, section in tiles %}
<a href="#{{ section }}" id="total-{{ status }}" class="{{ status }}{{ ' some' if tasks }}"><b>{{ "{:,}".format(tasks) }}</b>{{ status | word }}
{%- if status not in live %} in 24 hours{% endif %}</a>
{% endfor %}
</div>

<section id="failed"><h2>Failed lately</h2>{{ task_lines(failed) }}
{%- if not failed.shown %}<p class="quiet">Nothing has failed.</p>{% endif %}</section>

<section id="running"><h2>Running now</h2>{{ task_lines(running) }}
{%- if not running.shown %}<p class="quiet">Nothing is running.</p>{% endif %}</section>

{% if bars %}
<div class="charts">
<section id="chart-finished"><h2>Finished tasks</h2>
<p class="quiet">Each bar is {{ (bars[0].until - bars[0].since) | span }}, the highest is {{ "{:,}".format(finished.most) }}</p>
{{ chart(finished.columns, bars, "Finished tasks over time") }}
<p class="key">{% for status, tasks, _ in tiles if status not in live and tasks %}<span class="{{ status }}">{{ status | word }}</span>
{% endfor %}</p></section>
<section id="chart-waited"><h2>How long tasks waited to start</h2>
<p class="quiet">Mean of the tasks of each bar, the highest is {{ waited.most | span }}</p>
{{ chart(waited.columns, bars, "Mean time from enqueue to start") }}</section>
</div>
{% else %}<section><p class="quiet">Nothing has finished in the last 24 hours.</p></section>
{% endif %}

<section id="waiting"><h2>Waiting</h2>{{ task_lines(waiting, true) }}
{%- if not waiting.shown %}<p class="quiet">Nothing is waiting.</p>{% endif %}</section>

<section id="ended"><h2>Ended lately</h2>{{ task_lines(ended, true) }}
{%- if not ended.shown %}<p class="quiet">Nothing has ended.</p>{% endif %}</section>

{% if costs %}
<section id="costs"><h2>Cost per day</h2>
<table><thead><tr><th>day</th>{% for name in costs[""] %}<th class="number">{{ name | breakable }}</th>{% endfor %}</tr></thead>
<tbody>
{% for day, amounts in costs.items() if day %}
<tr><td data-label="day">{{ day }}</td>{% for amount in amounts %}<td class="number" data-label="{{ costs[""][loop.index0] }}">{{ amount }}</td>{% endfor %}</tr>
{% endfor %}
</tbody></table></section>
{% endif %}

<section id="counts"><h2>By queue and type of task</h2>
<table><thead><tr><th>queue and type</th>
{% for status, _, _ in tiles %}<th class="number">{{ status | word }}{% if status not in live %}, 24&nbsp;h{% endif %}</th>{% endfor %}
<th class="number">oldest pending</th><th class="number">waited (median)</th><th class="number">ran (median)</th></tr></thead>
<tbody>
{% for queue, task_type, numbers, seconds in counts %}
<tr class="{{ 'type' if task_type else 'total' }}" data-queue="{{ queue }}" data-type="{{ task_type }}">
<td data-label="{{ 'type' if task_type else 'queue' }}">{{ (task_type or queue) | breakable }}</td>
{% for status, _, _ in tiles %}{% set tasks = numbers[status] %}
<td class="number{{ ' zero' if not tasks }}{{ ' status failed' if status == 'failed' and tasks }}" data-status="{{ status }}" data-label="{{ status | word }}{% if status not in live %}, 24 h{% endif %}">{{ "{:,}".format(tasks) }}</td>
{% endfor %}
{% for label, value in seconds %}
<td class="number{{ ' zero' if value is none }}" data-seconds="{{ value if value is not none }}" data-label="{{ label }}">{{ value | span }}</td>
{% endfor %}</tr>
{% endfor %}
</tbody></table></section>
</main>
</html>
"""
