package main

import (
	"fmt"
	"io"
	"strings"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// printTables writes the tables of what was asked for.
func (s *statsRun) printTables(stats *resealv1.GetStatsResponse) {
	switch s.what {
	case "pools":
		writeStats(s.out, "POOL", stats.GetPools(), nil)
	case "listeners":
		writeStats(s.out, "LISTENER", stats.GetListeners(), stats.GetEdges())
	case "edges":
		s.printEdgeTables(stats.GetEdges())
	default:
		writeStats(s.out, "POOL", stats.GetPools(), nil)
		s.printf("\n")
		writeStats(s.out, "LISTENER", stats.GetListeners(), stats.GetEdges())
	}
}

func (s *statsRun) printEdgeTables(edges []*resealv1.EdgeStats) {
	if len(edges) == 0 {
		s.printf("No edge has reported yet.\n")
	}
	for i, edge := range edges {
		if i > 0 {
			s.printf("\n")
		}
		title := "Edge " + edge.GetEdge()
		if edge.GetStale() {
			title += " (stale: no new report)"
		}
		s.printf("%s\n", title)
		writeStats(s.out, "POOL", edge.GetPools(), nil)
		writeStats(s.out, "LISTENER", edge.GetListeners(), nil)
	}
}

// writeStats writes a row for each pool or listener, and below it what explains
// the numbers. Where edges are given, those that matter are named.
func writeStats(w io.Writer, what string, all []*resealv1.Stats, edges []*resealv1.EdgeStats) {
	if len(all) == 0 {
		fmt.Fprintf(w, "No %s has counters yet.\n", strings.ToLower(what))
		return
	}
	var rows strings.Builder
	t := newTable(&rows, what, "REQUESTS", "FULL", "RESUMED", "MECHANISMS", "CONNECTIONS", "ERRORS")
	for _, s := range all {
		h := s.GetHandshakes()
		t.add(s.GetName(), fmt.Sprint(s.GetRequests()), fmt.Sprint(h.GetFull()), resumedText(h), mechanisms(h),
			connectionsText(s.GetConnections()), fmt.Sprint(total(s.GetErrors())))
	}
	t.flush()
	lines := strings.SplitAfter(rows.String(), "\n")
	fmt.Fprint(w, lines[0])
	for i, s := range all {
		fmt.Fprint(w, lines[i+1])
		for _, line := range explanations(s, edges) {
			fmt.Fprintf(w, "  %s\n", line)
		}
	}
}

// explanations are the lines below a row.
func explanations(s *resealv1.Stats, edges []*resealv1.EdgeStats) []string {
	var lines []string
	add := func(title, text string) {
		if text != "" {
			lines = append(lines, title+": "+text)
		}
	}
	add("why full", counted(s.GetMisses()))
	lines = append(lines, epochLines(s.GetEpochs())...)
	add("edges without the key", counted(unknownKeys(edges, s.GetName())))
	if failed := s.GetHandshakes().GetFailed(); failed > 0 {
		add("failed handshakes", fmt.Sprint(failed))
	}
	add("closes", counted(s.GetCloses()))
	add("closed first by", counted(s.GetClosesBy()))
	add("errors", counted(s.GetErrors()))
	return lines
}

// resumedText is the number of resumed handshakes with their share of all that
// were completed.
func resumedText(h *resealv1.Handshakes) string {
	resumed := resumedTotal(h)
	all := resumed + h.GetFull()
	if all == 0 {
		return "0"
	}
	return fmt.Sprintf("%d (%s%%)", resumed, percent(resumed, all))
}

// percent is rounded down, so that 100 means all.
func percent(part, all uint64) string {
	tenths := part * 1000 / all
	if tenths%10 == 0 {
		return fmt.Sprint(tenths / 10)
	}
	return fmt.Sprintf("%d.%d", tenths/10, tenths%10)
}

func mechanisms(h *resealv1.Handshakes) string {
	return counted0(map[string]uint64{
		"session_id": h.GetResumedSessionId(),
		"ticket":     h.GetResumedTicket(),
		"psk":        h.GetResumedPsk(),
	})
}

func counted0(counts map[string]uint64) string {
	if text := counted(counts); text != "" {
		return text
	}
	return "-"
}

func connectionsText(c *resealv1.ConnectionStats) string {
	text := fmt.Sprintf("%d opened, %d reused", c.GetOpened(), c.GetReused())
	if open := c.GetActive() + c.GetIdle(); open > 0 {
		text += fmt.Sprintf(", %d open now", open)
	}
	return text
}
