package main

import (
	"context"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/reseal/reseal/proto/manifest"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

const impactHelp = "ask live edges what the change would do to them, for 5 s at most: who refuses it, what it costs"

// registerImpact adds --impact.
func registerImpact(cmd *cobra.Command) *bool {
	return cmd.Flags().Bool("impact", false, impactHelp)
}

// impact asks what the change that manifests say would do to the fleet.
func (a *app) impact(ctx context.Context, flags changeFlags, objects []manifest.Object) (*resealv1.PreviewChangeResponse, error) {
	client, err := a.connect()
	if err != nil {
		return nil, err
	}
	apply := &resealv1.ApplyRequest{ExpectedRevision: flags.expectedRevision}
	for _, object := range objects {
		apply.Resources = append(apply.Resources, object.Resource)
	}
	response, err := client.fleet.PreviewChange(ctx, &resealv1.PreviewChangeRequest{Apply: apply})
	return response, located(objects, err)
}

// impactLines say what a change would do, briefly.
func impactLines(r *resealv1.PreviewChangeResponse) []string {
	about := ""
	if r.GetAnswered() < r.GetEdges() {
		about = "about "
	}
	lines := []string{fmt.Sprintf("impact: asked %s, %d answered", ofEdges(r.GetAsked(), r.GetEdges()), r.GetAnswered())}
	if about != "" && r.GetAnswered() > 0 {
		lines[0] += "; counts are estimates for all"
	}
	add := func(format string, args ...any) { lines = append(lines, "  "+fmt.Sprintf(format, args...)) }
	for _, v := range r.GetViolations() {
		verb := "refuse"
		if v.GetEdges() == 1 {
			verb = "refuses"
		}
		add("%s%s (%s) %s: %s", about, plural(uint64(v.GetEdges()), "edge"), someNames(v.GetNames(), v.GetEdges()), verb, v.GetViolation().Text())
	}
	lines = append(lines, identityLines(r.GetPools())...)
	for _, p := range r.GetPools() {
		if p.GetRemoved() {
			add("BackendPool/%s goes from %s%s", p.GetName(), about, plural(uint64(p.GetEdges()), "edge"))
		}
	}
	for _, l := range r.GetListeners() {
		add("Listener/%s %s on %s%s", l.GetName(), listenerText(l), about, plural(uint64(l.GetEdges()), "edge"))
	}
	if n := r.GetConnections(); n > 0 {
		verb := "drain"
		if n == 1 {
			verb = "drains"
		}
		add("%s%s %s", about, plural(uint64(n), "connection"), verb)
	}
	for _, u := range r.GetUnknown() {
		add("%s (%s) can't tell: %s", plural(uint64(u.GetEdges()), "edge"), someNames(u.GetNames(), u.GetEdges()), u.GetReason())
	}
	if len(lines) == 1 && r.GetAnswered() > 0 {
		add("nothing drains, and no edge refuses it")
	}
	return lines
}

// identityLines are "trust of 3 pools changes: about 48 full handshakes (a, b, c)".
func identityLines(pools []*resealv1.PoolImpact) []string {
	type group struct {
		names      []string
		handshakes int64
	}
	groups, order := map[string]*group{}, []string{}
	for _, p := range pools {
		if len(p.GetChanges()) == 0 {
			continue
		}
		what := strings.Join(p.GetChanges(), ", ")
		if groups[what] == nil {
			groups[what] = &group{}
			order = append(order, what)
		}
		groups[what].names = append(groups[what].names, p.GetName())
		groups[what].handshakes += p.GetFullHandshakes()
	}
	var lines []string
	for _, what := range order {
		g := groups[what]
		lines = append(lines, fmt.Sprintf("  %s of %s changes: about %s (%s)", what, plural(uint64(len(g.names)), "pool"),
			plural(uint64(g.handshakes), "full handshake"), joinSome(g.names, 5)))
	}
	return lines
}

func listenerText(l *resealv1.ListenerImpact) string {
	switch l.GetAction() {
	case resealv1.ListenerImpact_ACTION_OPENS:
		return "opens at " + l.GetAddress()
	case resealv1.ListenerImpact_ACTION_CLOSES:
		return "closes"
	case resealv1.ListenerImpact_ACTION_MOVES:
		return "moves to " + l.GetAddress()
	case resealv1.ListenerImpact_ACTION_DECLINES_TICKETS:
		return "declines the tickets that its clients have"
	}
	return "changes"
}

func ofEdges(asked, all int32) string {
	if asked == all {
		return plural(uint64(all), "edge")
	}
	return fmt.Sprintf("%d of %s", asked, plural(uint64(all), "edge"))
}

// someNames are the names of some of n edges.
func someNames(names []string, n int32) string {
	text := strings.Join(names, ", ")
	if more := int(n) - len(names); more > 0 {
		text += ", …"
	}
	return text
}

func (a *app) printImpact(r *resealv1.PreviewChangeResponse) {
	for _, line := range impactLines(r) {
		a.printf("%s\n", printable(line))
	}
}
