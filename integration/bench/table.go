package bench

import (
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"text/tabwriter"
)

// Table collects results and prints them.
type Table struct {
	// Requests of each scenario, where it does not take a part of them.
	Requests int
	// Proxies are the columns, in order.
	Proxies []string
	// Markdown prints for a README instead of a terminal.
	Markdown bool

	rows map[string]map[string]Result
}

// Add takes a result.
func (t *Table) Add(r Result) {
	if t.rows == nil {
		t.rows = make(map[string]map[string]Result)
	}
	if t.rows[r.Scenario.Key] == nil {
		t.rows[r.Scenario.Key] = make(map[string]Result)
	}
	t.rows[r.Scenario.Key][r.Proxy] = r
}

// Write prints the table and what stands beside it.
func (t *Table) Write(w io.Writer) error {
	for _, part := range []struct {
		heading string
		stock   bool
	}{
		{"stock Jetty, certificate with two names, closes after each response", true},
		{"arranged Jetty", false},
	} {
		if err := t.summary(w, part.heading, func(s *Scenario) bool { return (s.backend != nil) == part.stock }); err != nil {
			return err
		}
	}
	if err := t.details(w); err != nil {
		return err
	}
	return t.ours(w)
}

// summary is the full handshakes of some scenarios.
func (t *Table) summary(w io.Writer, heading string, belongs func(*Scenario) bool) error {
	scenarios := slices.DeleteFunc(t.scenarios(), func(s *Scenario) bool { return !belongs(s) })
	if len(scenarios) == 0 {
		return nil
	}
	proxies := slices.DeleteFunc(slices.Clone(t.Proxies), func(proxy string) bool {
		return !slices.ContainsFunc(scenarios, func(s *Scenario) bool { return s.Runs(proxy) })
	})
	heading = fmt.Sprintf("%s: full handshakes per %s requests", heading, group(t.Requests))
	g := t.grid(w, append(append([]string{heading}, headings(proxies)...), "Reseal must"))
	for _, s := range scenarios {
		cells := []string{t.title(s)}
		for _, proxy := range proxies {
			r, ok := t.rows[s.Key][proxy]
			cell := "–"
			if ok {
				cell = group(int(r.Counts.Full))
			}
			if t.Markdown && proxy == ProxyReseal {
				cell = "**" + cell + "**"
			}
			cells = append(cells, cell)
		}
		g.row(append(cells, s.must()))
	}
	return g.end()
}

// details are what the proxies did besides, each cell one number per proxy.
func (t *Table) details(w io.Writer) error {
	order := strings.Join(t.Proxies, " / ")
	resets := "RSTs to the backend"
	for _, row := range t.rows {
		for _, r := range row {
			if r.ResetsByKernel {
				resets = "RSTs of the whole machine"
			}
		}
	}
	g := t.grid(w, []string{order, "connections", "resumed", resets, "ended without close_notify", "TIME_WAIT", "failed requests", "retried", "RSTs after the end", "after a restart", "p50 µs", "p99 µs"})
	columns := []func(Result) int64{
		func(r Result) int64 { return r.Counts.Connections },
		func(r Result) int64 { return r.Counts.Resumed() },
		func(r Result) int64 { return r.Resets },
		func(r Result) int64 { return r.Unclean },
		func(r Result) int64 { return r.TimeWait },
		func(r Result) int64 { return r.Failed },
		func(r Result) int64 { return r.Retried },
		func(r Result) int64 { return r.LateResets },
		func(r Result) int64 { return r.AfterStart },
		func(r Result) int64 { return r.P50.Microseconds() },
		func(r Result) int64 { return r.P99.Microseconds() },
	}
	for _, s := range t.scenarios() {
		cells := []string{t.title(s)}
		for _, column := range columns {
			var numbers []string
			for _, proxy := range t.Proxies {
				cell := "–"
				if r, ok := t.rows[s.Key][proxy]; ok {
					cell = group(int(column(r)))
				}
				numbers = append(numbers, cell)
			}
			cells = append(cells, strings.Join(numbers, " / "))
		}
		g.row(cells)
	}
	return g.end()
}

// ours is what Reseal says itself.
func (t *Table) ours(w io.Writer) error {
	g := t.grid(w, []string{"what Reseal counts itself", "full", "resumed", "why not resumed", "how connections ended"})
	for _, s := range t.scenarios() {
		if r, ok := t.rows[s.Key][ProxyReseal]; ok {
			g.row([]string{t.title(s), group(int(r.Ours.Full)), group(int(r.Ours.Resumed)), list(r.Ours.Misses), list(r.Ours.Closes)})
		}
	}
	return g.end()
}

func (t *Table) scenarios() []*Scenario {
	return slices.DeleteFunc(Scenarios(), func(s *Scenario) bool { return t.rows[s.Key] == nil })
}

func headings(proxies []string) []string {
	programs := map[string]string{ProxyHAProxy: "haproxy", ProxyNginx: "nginx"}
	var headings []string
	for _, proxy := range proxies {
		if program := programs[proxy]; program != "" {
			proxy += " " + versionOf(program)
		}
		headings = append(headings, proxy)
	}
	return headings
}

func (t *Table) title(s *Scenario) string {
	if s.share > 0 {
		return fmt.Sprintf("%s (%s requests)", s.Title, group(s.requests(t.Requests)))
	}
	return s.Title
}

// list is "reason n, reason n", the most frequent first.
func list(counts map[string]int64) string {
	names := slices.SortedFunc(maps.Keys(counts), func(a, b string) int {
		if counts[a] != counts[b] {
			return int(counts[b] - counts[a])
		}
		return strings.Compare(a, b)
	})
	var parts []string
	for _, name := range names {
		parts = append(parts, fmt.Sprintf("%s %s", name, group(int(counts[name]))))
	}
	return strings.Join(parts, ", ")
}

// group writes a number with a comma between thousands.
func group(n int) string {
	if n < 0 {
		return "?"
	}
	text := fmt.Sprint(n)
	for at := len(text) - 3; at > 0; at -= 3 {
		text = text[:at] + "," + text[at:]
	}
	return text
}

// grid prints rows as markdown or in columns.
type grid struct {
	markdown bool
	out      io.Writer
	columns  *tabwriter.Writer
	err      error
}

func (t *Table) grid(w io.Writer, header []string) *grid {
	g := &grid{markdown: t.Markdown, out: w, columns: tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)}
	g.row(header)
	if g.markdown {
		g.row(slices.Repeat([]string{"---"}, len(header)))
	}
	return g
}

func (g *grid) row(cells []string) {
	if g.err != nil {
		return
	}
	if g.markdown {
		_, g.err = fmt.Fprintf(g.out, "| %s |\n", strings.Join(cells, " | "))
		return
	}
	_, g.err = fmt.Fprintln(g.columns, strings.Join(cells, "\t"))
}

func (g *grid) end() error {
	if g.err == nil && !g.markdown {
		g.err = g.columns.Flush()
	}
	if g.err == nil {
		_, g.err = fmt.Fprintln(g.out)
	}
	return g.err
}
