package main

import (
	"fmt"
	"io"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// columnGap stands between two columns.
const columnGap = "   "

// table writes rows in aligned columns. Rows that come later, as in a watch,
// keep the widths of those before.
type table struct {
	w       io.Writer
	headers []string // nil when they are written already
	widths  []int
	rows    [][]string
}

func newTable(w io.Writer, headers ...string) *table {
	return &table{w: w, headers: headers, widths: make([]int, len(headers))}
}

// add takes the cells of one row, as many as there are headers.
func (t *table) add(cells ...string) {
	for i := range cells {
		cells[i] = printable(cells[i])
	}
	t.rows = append(t.rows, cells)
}

// flush writes the rows that were added since the last flush.
func (t *table) flush() {
	rows := t.rows
	if t.headers != nil {
		rows = slices.Insert(rows, 0, t.headers)
	}
	for _, row := range rows {
		for i, cell := range row {
			t.widths[i] = max(t.widths[i], utf8.RuneCountInString(cell))
		}
	}
	for _, row := range rows {
		var line strings.Builder
		for i, cell := range row {
			line.WriteString(cell)
			line.WriteString(strings.Repeat(" ", t.widths[i]-utf8.RuneCountInString(cell)))
			line.WriteString(columnGap)
		}
		fmt.Fprintln(t.w, strings.TrimRight(line.String(), " "))
	}
	t.headers, t.rows = nil, nil
}

// printable keeps a cell on its line and the terminal's state its own.
func printable(cell string) string { return resealv1.Visible(cell) }

func orNone(s string) string {
	if s == "" {
		return "<none>"
	}
	return s
}

// joinSome joins at most limit items and counts the others.
func joinSome(items []string, limit int) string {
	if len(items) <= limit {
		return orNone(strings.Join(items, ","))
	}
	return fmt.Sprintf("%s +%d more", strings.Join(items[:limit], ","), len(items)-limit)
}

// joinLabels writes labels as -l takes them, sorted.
func joinLabels(labels map[string]string) string {
	pairs := make([]string, 0, len(labels))
	for key, value := range labels {
		pairs = append(pairs, key+"="+value)
	}
	slices.Sort(pairs)
	return orNone(strings.Join(pairs, ","))
}

// age is the time since t as tables show it.
func age(t *timestamppb.Timestamp) string {
	if t == nil {
		return "<unknown>"
	}
	return shortDuration(time.Since(t.AsTime()))
}

// shortDuration writes d with at most two units.
func shortDuration(d time.Duration) string {
	d = max(d, 0)
	const day = 24 * time.Hour
	units := func(big time.Duration, bigName string, small time.Duration, smallName string) string {
		if rest := d % big / small; rest > 0 {
			return fmt.Sprintf("%d%s%d%s", d/big, bigName, rest, smallName)
		}
		return fmt.Sprintf("%d%s", d/big, bigName)
	}
	switch {
	case d < 2*time.Minute:
		return fmt.Sprintf("%ds", d/time.Second)
	case d < 10*time.Minute:
		return units(time.Minute, "m", time.Second, "s")
	case d < 3*time.Hour:
		return fmt.Sprintf("%dm", d/time.Minute)
	case d < 8*time.Hour:
		return units(time.Hour, "h", time.Minute, "m")
	case d < 2*day:
		return fmt.Sprintf("%dh", d/time.Hour)
	case d < 8*day:
		return units(day, "d", time.Hour, "h")
	case d < 2*365*day:
		return fmt.Sprintf("%dd", d/day)
	}
	return units(365*day, "y", day, "d")
}

// configured is a duration as manifests write it.
func configured(d *durationpb.Duration) string {
	if d == nil {
		return "<none>"
	}
	text := d.AsDuration().String()
	if strings.HasSuffix(text, "m0s") {
		text = strings.TrimSuffix(text, "0s")
	}
	if strings.HasSuffix(text, "h0m") {
		text = strings.TrimSuffix(text, "0m")
	}
	return text
}

// stamp is a point in time, to the second, in the local zone.
func stamp(t *timestamppb.Timestamp) string {
	if t == nil {
		return "<unknown>"
	}
	return t.AsTime().Local().Format(time.RFC3339)
}
