package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
)

// form is how results are printed.
type form int

const (
	formText form = iota
	formMarkdown
	formJSON
)

// results are the values of all rounds.
type results struct {
	workloads []*workload
	growths   []growth
	proxies   []*proxy
	values    map[string]map[string][]float64 // workload, proxy, round
}

func newResults(b *bed) *results {
	r := &results{proxies: b.proxies, values: make(map[string]map[string][]float64)}
	for _, w := range workloads() {
		if b.options.workload.MatchString(w.key) {
			r.workloads = append(r.workloads, w)
		}
	}
	for _, g := range growths() {
		if b.options.linear && b.options.workload.MatchString(g.key) {
			r.growths = append(r.growths, g)
		}
	}
	return r
}

func (r *results) add(workload, proxy string, value float64) {
	if r.values[workload] == nil {
		r.values[workload] = make(map[string][]float64)
	}
	r.values[workload][proxy] = append(r.values[workload][proxy], value)
}

// median of values; 0 for none.
func median(values []float64) float64 {
	if len(values) == 0 {
		return 0
	}
	sorted := slices.Sorted(slices.Values(values))
	middle := len(sorted) / 2
	if len(sorted)%2 == 1 {
		return sorted[middle]
	}
	return (sorted[middle-1] + sorted[middle]) / 2
}

// ratio is the median of the ratios of two proxies within rounds, and their least
// and largest.
func ratio(ours, theirs []float64) (middle, least, most float64) {
	var ratios []float64
	for i := range min(len(ours), len(theirs)) {
		if theirs[i] > 0 {
			ratios = append(ratios, ours[i]/theirs[i])
		}
	}
	if len(ratios) == 0 {
		return 0, 0, 0
	}
	return median(ratios), slices.Min(ratios), slices.Max(ratios)
}

// reference is the peer of this release that Reseal is compared with, or nil.
func (r *results) reference() *proxy {
	i := slices.IndexFunc(r.proxies, func(p *proxy) bool { return p.key != keyReseal && !p.newest })
	if i < 0 {
		return nil
	}
	return r.proxies[i]
}

// best is the newest peer that does best in a workload, or nil.
func (r *results) best(w *workload) *proxy {
	var best *proxy
	for _, p := range r.proxies {
		values := r.values[w.key]
		if p.newest && len(values[p.key]) > 0 && (best == nil || median(values[p.key]) < median(values[best.key])) {
			best = p
		}
	}
	return best
}

// compare is a cell: the ratio of Reseal to a peer, its range and its bound.
func (r *results) compare(w *workload, peer *proxy, bound float64) string {
	if peer == nil {
		return "–"
	}
	middle, least, most := ratio(r.values[w.key][keyReseal], r.values[w.key][peer.key])
	if middle == 0 {
		return "–"
	}
	cell := fmt.Sprintf("%.2f (%.2f–%.2f)", middle, least, most)
	if bound > 0 {
		cell += fmt.Sprintf(", ≤ %.2f", bound)
	}
	return cell
}

// rows of the first table, its heading included.
func (r *results) rows() [][]string {
	reference := r.reference()
	heading := []string{"1 KB answers, TLS on both legs"}
	for _, p := range r.proxies {
		heading = append(heading, p.title)
	}
	if reference != nil {
		heading = append(heading, "Reseal to "+reference.title)
	}
	rows := [][]string{append(heading, "to the best of the newest")}
	for _, w := range r.workloads {
		row := []string{w.title + ", " + w.unit}
		for _, p := range r.proxies {
			cell := "–"
			if values := r.values[w.key][p.key]; len(values) > 0 {
				cell = strconv.FormatFloat(median(values), 'f', w.decimals, 64)
			}
			row = append(row, cell)
		}
		if reference != nil {
			row = append(row, r.compare(w, reference, w.release))
		}
		rows = append(rows, append(row, r.compare(w, r.best(w), w.newest)))
	}
	return rows
}

// growthRows are those of the second table: Reseal's, and beside them those of the
// peers that were measured.
func (r *results) growthRows() [][]string {
	heading := []string{"Reseal, HTTP/1.1 keep-alive, cost of a request", "times"}
	proxies := []string{keyReseal}
	for _, p := range r.proxies {
		measured := func(g growth) bool { return len(r.values[g.key][p.key]) > 0 }
		if p.key != keyReseal && slices.ContainsFunc(r.growths, measured) {
			heading, proxies = append(heading, p.title), append(proxies, p.key)
		}
	}
	rows := [][]string{heading}
	for _, g := range r.growths {
		if len(r.values[g.key][keyReseal]) == 0 {
			continue
		}
		row := []string{g.title}
		for _, key := range proxies {
			cell := "–"
			if values := r.values[g.key][key]; len(values) > 0 {
				cell = fmt.Sprintf("%.2f (%.2f–%.2f)", median(values), slices.Min(values), slices.Max(values))
			}
			row = append(row, cell)
		}
		rows = append(rows, row)
	}
	return rows
}

// write prints the tables.
func (r *results) write(w io.Writer, as form) error {
	if as == formJSON {
		encoder := json.NewEncoder(w)
		encoder.SetIndent("", "  ")
		return encoder.Encode(r.values)
	}
	tables := [][][]string{r.rows()}
	if rows := r.growthRows(); len(rows) > 1 {
		tables = append(tables, rows)
	}
	var errs []error
	for i, rows := range tables {
		if i > 0 {
			_, _ = io.WriteString(w, "\n")
		}
		errs = append(errs, grid(w, rows, as == formMarkdown))
	}
	return errors.Join(errs...)
}

// grid prints rows in columns, or as markdown.
func grid(w io.Writer, rows [][]string, markdown bool) error {
	if !markdown {
		columns := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
		for _, row := range rows {
			_, _ = fmt.Fprintln(columns, strings.Join(row, "\t"))
		}
		return columns.Flush()
	}
	for i, row := range rows {
		_, err := fmt.Fprintf(w, "| %s |\n", strings.Join(row, " | "))
		if err == nil && i == 0 {
			_, err = fmt.Fprintf(w, "|%s\n", strings.Repeat(" --- |", len(row)))
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// The lines of a README between which the table stands.
const (
	tableBegins = "<!-- make bench writes from here -->\n"
	tableEnds   = "<!-- to here -->\n"
)

// replace puts the tables into a file.
func (r *results) replace(path string) error {
	text, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	before, rest, begins := bytes.Cut(text, []byte(tableBegins))
	_, after, ends := bytes.Cut(rest, []byte(tableEnds))
	if !begins || !ends {
		return fmt.Errorf("%s has no lines %q and %q", path, tableBegins, tableEnds)
	}
	var tables bytes.Buffer
	if err := r.write(&tables, formMarkdown); err != nil {
		return err
	}
	return os.WriteFile(path, slices.Concat(before, []byte(tableBegins), tables.Bytes(), []byte(tableEnds), after), 0o644)
}
