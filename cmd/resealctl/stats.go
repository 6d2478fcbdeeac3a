package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/durationpb"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

const statsLong = `Show how often TLS sessions were resumed, and why not more often.

For each pool and listener: requests, full and resumed handshakes, the reasons
of the full ones, connections, how they were closed, and errors. Counters are
totals of the fleet since each edge's start; --since takes the last minutes only,
and a note names edges of which the control plane has no reports of that age.

A full handshake costs a certificate and a signature. "why full" says what would
have been needed to resume instead:
  no_session            the first handshake of an endpoint and name: one is normal
  declined              the backend forgot the session, or never keeps any
  declined_after_unclean_close
                        the same, after a connection ended without close_notify
  unsupported_by_peer   the backend gives out no sessions
  not_offered           the client came without a ticket
  key_unknown           the client's ticket is of a key that the edge does not
                        have; the edges are named

Below a listener stands how the tickets of each epoch of its keyring fared. "other
tickets" are damaged, of somebody else's servers, or of an epoch that is no
longer listed.`

// maxSince is the longest window that the control plane keeps.
const maxSince = time.Hour

// statsRun is one run of stats or top.
type statsRun struct {
	*app
	client   *client
	what     string // "pools", "listeners", "edges", "" for pools and listeners
	name     string
	edge     string
	since    time.Duration
	interval time.Duration
	format   *format
}

func newStatsCommand(a *app) *cobra.Command {
	s := &statsRun{app: a}
	var watch bool
	cmd := &cobra.Command{
		Use:               "stats [pools|listeners|edges] [NAME]",
		Short:             "Show handshakes, connections and errors",
		Long:              statsLong,
		Example:           "  resealctl stats\n  resealctl stats pools jetty --since 5m\n  resealctl stats pools jetty -o json",
		Args:              cobra.MaximumNArgs(2),
		ValidArgsFunction: a.completeStats,
	}
	cmd.Flags().DurationVar(&s.since, "since", 0, "only this far back, at most 1h (default since each edge's start)")
	cmd.Flags().StringVar(&s.edge, "edge", "", "only this edge")
	cmd.Flags().BoolVarP(&watch, "watch", "w", false, "stay and show them again and again")
	cmd.Flags().DurationVar(&s.interval, "interval", 2*time.Second, "time between two of them with -w")
	_ = cmd.RegisterFlagCompletionFunc("edge", a.completeEdges)
	s.format = registerFormat(cmd, "table", "json", "yaml")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if err := s.parse(args); err != nil {
			return err
		}
		var err error
		if s.client, err = a.connect(); err != nil {
			return err
		}
		if watch {
			return untilInterrupted(s.watch(cmd.Context()))
		}
		return s.once(cmd.Context())
	}
	return cmd
}

func (s *statsRun) parse(args []string) error {
	if len(args) > 0 {
		switch strings.ToLower(args[0]) {
		case "pool", "pools", "backendpool", "backendpools":
			s.what = "pools"
		case "listener", "listeners":
			s.what = "listeners"
		case "edge", "edges":
			s.what = "edges"
		default:
			return usagef("there are stats of pools, listeners and edges, not of %q", args[0])
		}
	}
	if len(args) > 1 {
		s.name = args[1]
	}
	if s.what == "edges" && s.name != "" {
		if s.edge != "" && s.edge != s.name {
			return usagef("either --edge or a name, not both")
		}
		s.edge = s.name
	}
	if s.since < 0 || s.since > maxSince {
		return usagef("--since must be between 0 and %s", configured(durationpb.New(maxSince)))
	}
	if s.interval < 500*time.Millisecond {
		return usagef("--interval must be at least 500ms")
	}
	return nil
}

func (s *statsRun) request() *resealv1.GetStatsRequest {
	request := &resealv1.GetStatsRequest{Edge: s.edge}
	if s.what != "edges" {
		request.Name = s.name
	}
	if s.since > 0 {
		request.Since = durationpb.New(s.since)
	}
	return request
}

func (s *statsRun) once(ctx context.Context) error {
	stats, err := s.client.tally.GetStats(ctx, s.request())
	if err != nil {
		return err
	}
	if err := s.complete(ctx, stats); err != nil {
		return err
	}
	return s.print(stats)
}

// complete adds what was named, exists and has no counters yet. What does not
// exist is an error.
func (s *statsRun) complete(ctx context.Context, stats *resealv1.GetStatsResponse) error {
	if s.edge != "" && !slices.ContainsFunc(stats.GetEdges(), func(e *resealv1.EdgeStats) bool { return e.GetEdge() == s.edge }) {
		edges, err := s.client.fleet.ListEdges(ctx, &resealv1.ListEdgesRequest{Id: s.edge})
		if err != nil {
			return err
		}
		if !slices.ContainsFunc(edges.GetEdges(), func(e *resealv1.Edge) bool { return e.GetId() == s.edge }) {
			return notFound("edge", s.edge)
		}
		stats.Edges = append(stats.Edges, &resealv1.EdgeStats{Edge: s.edge, Stale: true})
	}
	kind, rows := "BackendPool", &stats.Pools
	if s.what == "listeners" {
		kind, rows = "Listener", &stats.Listeners
	}
	if s.what == "edges" || s.name == "" || len(*rows) > 0 {
		return nil
	}
	ref := &resealv1.ResourceRef{Kind: kind, Name: s.name}
	_, err := s.client.admin.Get(ctx, &resealv1.GetRequest{Resource: ref})
	if errors.Is(err, errNotFound) {
		return resourceNotFound(ref)
	}
	*rows = append(*rows, &resealv1.Stats{Name: s.name})
	return err
}

func (s *statsRun) watch(ctx context.Context) error {
	first := s.request()
	stream, err := s.client.tally.WatchStats(ctx, &resealv1.WatchStatsRequest{
		Name: first.GetName(), Since: first.GetSince(), Edge: first.GetEdge(),
		Interval: durationpb.New(s.interval),
	})
	if err != nil {
		return err
	}
	for shown := 0; ; shown++ {
		response, err := stream.Recv()
		if err != nil {
			return err
		}
		if shown == 0 {
			if err := s.complete(ctx, response.GetStats()); err != nil {
				return err
			}
		}
		switch {
		case shown > 0 && s.format.structured():
			s.separateDocuments(s.format)
		case shown > 0:
			s.printf("\n")
		}
		if !s.format.structured() {
			s.printf("%s\n", stamp(response.GetStats().GetTime()))
		}
		if err := s.print(response.GetStats()); err != nil {
			return err
		}
	}
}

func (s *statsRun) print(stats *resealv1.GetStatsResponse) error {
	s.noteGaps(stats, s.since)
	if s.format.structured() {
		return s.printDocument(s.format, s.view(stats))
	}
	s.printTables(stats)
	return nil
}

// noteGaps says what the counters lack: new reports, and the part of the window
// that the control plane has no reports of.
func (a *app) noteGaps(stats *resealv1.GetStatsResponse, since time.Duration) {
	if stale := stats.GetStaleEdges(); len(stale) > 0 {
		a.warnf("Note: no new report from %s; their newest one is counted.\n", joinSome(stale, 10))
	}
	if since == 0 {
		return
	}
	now := stats.GetTime().AsTime()
	var late []string
	for _, e := range stats.GetEdges() {
		if start := e.GetWindowStart(); start != nil && now.Sub(start.AsTime()) < since {
			late = append(late, fmt.Sprintf("%s (%s)", e.GetEdge(), shortDuration(now.Sub(start.AsTime()))))
		}
	}
	if len(late) > 0 {
		a.warnf("Note: the windows of %s are shorter than --since: no older report of them is held.\n", joinSome(late, 10))
	}
}

// statsView is one pool's or listener's counters as -o json and yaml show them.
type statsView struct {
	Name           string            `json:"name"`
	Requests       uint64            `json:"requests"`
	Errors         uint64            `json:"errors"`
	ErrorsByReason map[string]uint64 `json:"errorsByReason"`
	Handshakes     handshakesView    `json:"handshakes"`
	Misses         map[string]uint64 `json:"misses"`
	Connections    connectionsView   `json:"connections"`
	Closes         map[string]uint64 `json:"closes"`
	// Of listeners alone: answers by class of status, and how long clients waited for
	// them; clients' tickets, and the edges that don't know some of their keys.
	Answers          map[string]uint64 `json:"answers,omitempty"`
	Waits            map[string]uint64 `json:"waits,omitempty"`
	Epochs           []epochStatsView  `json:"epochs,omitempty"`
	KeyUnknownByEdge map[string]uint64 `json:"keyUnknownByEdge,omitempty"`
}

type handshakesView struct {
	Full    uint64      `json:"full"`
	Resumed resumedView `json:"resumed"`
	Failed  uint64      `json:"failed"`
}

type resumedView struct {
	SessionID uint64 `json:"sessionId"`
	Ticket    uint64 `json:"ticket"`
	PSK       uint64 `json:"psk"`
}

type connectionsView struct {
	Opened uint64 `json:"opened"`
	Reused uint64 `json:"reused"`
	Active int64  `json:"active"`
	Idle   int64  `json:"idle"`
	// Share is what is shared out of a pool's connections.maxPerFleet, per endpoint: to
	// all edges, or to the one that the statistics are of.
	Share int64 `json:"share,omitempty"`
}

type edgeStatsView struct {
	Name  string `json:"name"`
	Stale bool   `json:"stale"`
	// With --since: where the window starts.
	WindowStart string      `json:"windowStart,omitempty"`
	Pools       []statsView `json:"pools"`
	Listeners   []statsView `json:"listeners"`
}

// statsDocument are the lists that were asked for.
type statsDocument struct {
	Pools      *[]statsView     `json:"pools,omitempty"`
	Listeners  *[]statsView     `json:"listeners,omitempty"`
	Edges      *[]edgeStatsView `json:"edges,omitempty"`
	Unanswered []unansweredView `json:"unanswered,omitempty"`
}

// view is the document: only the lists that were asked for.
func (s *statsRun) view(stats *resealv1.GetStatsResponse) any {
	document := statsDocument{Unanswered: viewUnanswered(stats.GetUnanswered())}
	if s.what == "edges" {
		views := make([]edgeStatsView, len(stats.GetEdges()))
		for i, e := range stats.GetEdges() {
			views[i] = edgeStatsView{e.GetEdge(), e.GetStale(), utcStamp(e.GetWindowStart()), viewStats(e.GetPools()), viewStats(e.GetListeners())}
		}
		document.Edges = &views
		return document
	}
	if s.what != "listeners" {
		pools := viewStats(stats.GetPools())
		document.Pools = &pools
	}
	if s.what != "pools" {
		listeners := viewListeners(stats)
		document.Listeners = &listeners
	}
	return document
}

// viewListeners are the fleet's listeners.
func viewListeners(stats *resealv1.GetStatsResponse) []statsView {
	views := viewStats(stats.GetListeners())
	for i := range views {
		views[i].KeyUnknownByEdge = unknownKeys(stats.GetEdges(), views[i].Name)
	}
	return views
}

func viewStats(all []*resealv1.Stats) []statsView {
	views := make([]statsView, len(all))
	for i, s := range all {
		h, c := s.GetHandshakes(), s.GetConnections()
		views[i] = statsView{
			Name: s.GetName(), Requests: s.GetRequests(), Errors: total(s.GetErrors()),
			ErrorsByReason: orEmpty(s.GetErrors()),
			Handshakes: handshakesView{h.GetFull(),
				resumedView{h.GetResumedSessionId(), h.GetResumedTicket(), h.GetResumedPsk()}, h.GetFailed()},
			Misses:      orEmpty(s.GetMisses()),
			Connections: connectionsView{c.GetOpened(), c.GetReused(), c.GetActive(), c.GetIdle(), c.GetShare()},
			Closes:      orEmpty(s.GetCloses()),
			Answers:     s.GetAnswers(),
			Waits:       s.GetWaits(),
			Epochs:      viewEpochs(s.GetEpochs()),
		}
	}
	return views
}

func orEmpty(counts map[string]uint64) map[string]uint64 {
	if counts == nil {
		return map[string]uint64{}
	}
	return counts
}

func total(counts map[string]uint64) uint64 {
	var sum uint64
	for _, n := range counts {
		sum += n
	}
	return sum
}

func resumedTotal(h *resealv1.Handshakes) uint64 {
	return h.GetResumedSessionId() + h.GetResumedTicket() + h.GetResumedPsk()
}

// counted writes counts as "no_session 1, declined 2", the largest first.
func counted(counts map[string]uint64) string {
	type entry struct {
		name string
		n    uint64
	}
	var entries []entry
	for name, n := range counts {
		if n > 0 {
			entries = append(entries, entry{name, n})
		}
	}
	slices.SortFunc(entries, func(a, b entry) int {
		if a.n != b.n {
			if a.n > b.n {
				return -1
			}
			return 1
		}
		return strings.Compare(a.name, b.name)
	})
	parts := make([]string, len(entries))
	for i, e := range entries {
		parts[i] = fmt.Sprintf("%s %d", e.name, e.n)
	}
	return strings.Join(parts, ", ")
}
