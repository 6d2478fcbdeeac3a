package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/durationpb"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

const observeLong = `Show what becomes of requests, as they end, on all edges, whichever replica of the
control plane is asked: where they went, what was answered and why, how long it took,
and whether the TLS sessions of both connections were reused, resumed or not, with the
reason. It goes on until Ctrl-C, or until as many were shown as --limit says. Edges
that connect meanwhile take part; edges and replicas that do not answer are named.
A request is shown when it ends: downloads and WebSockets late.

Edges apply the filter themselves, and no request waits for it. Each edge tells of 50
requests a second at most, and all edges of a replica of about 2,000. What comes
faster is left out and counted: at the end stands how many matched and how many were
shown. A narrower filter or --sample makes what is shown even.

With -o json each request is one line, for jq and the like. Of what clients send,
method, host and path are shown. Queries, cookies, tokens and all other fields never
leave the edges, since they may hold secrets. Hosts and paths may tell something of
clients too, so it takes the role operator.`

const observeExample = `  resealctl observe --pool jetty --status 5xx
  resealctl observe --pool jetty --full                        # what pays for full handshakes, and why
  resealctl observe --side frontend --miss-reason key_unknown  # whose tickets are not known
  resealctl observe --slower-than 500ms --path /api/ -n 20
  resealctl observe --sample 0.01 -o json | jq -r .host`

// observeRun is one run of observe.
type observeRun struct {
	*app
	client  *client
	request *resealv1.ObserveRequestsRequest
	format  *format
	limit   uint64

	table            *table // nil: with -o json
	shown            uint64
	matched, dropped uint64
	edges            int32 // that tell, -1: not known yet
	silent           map[string]bool
}

// observeFlags are flags that don't stand in a filter as they are.
type observeFlags struct {
	statuses, misses      []string
	slower                time.Duration
	side                  string
	full, resumed, reused bool
}

func newObserveCommand(a *app) *cobra.Command {
	filter := &resealv1.RequestFilter{}
	o := &observeRun{app: a, request: &resealv1.ObserveRequestsRequest{Filter: filter}, edges: -1}
	var flags observeFlags
	cmd := &cobra.Command{
		Use:     "observe",
		Short:   "Show requests of all edges as they end, by filter",
		Long:    observeLong,
		Example: observeExample,
		Args:    cobra.NoArgs,
	}
	o.format = registerFormat(cmd, "table", "wide", "json")
	f := cmd.Flags()
	f.StringVar(&o.request.Edge, "edge", "", "only those of this `edge`")
	f.StringVar(&filter.Pool, "pool", "", "only those to this `pool`")
	f.StringVar(&filter.Listener, "listener", "", "only those by this `listener`")
	f.StringVar(&filter.Route, "route", "", "only those that took this `route`")
	f.StringVar(&filter.Host, "host", "", "only those for this `host`, for protocol tls with this SNI")
	f.StringVar(&filter.PathPrefix, "path", "", "only those whose path begins with this `prefix`")
	f.StringSliceVar(&flags.statuses, "status", nil, "only those answered so: 503, 5xx, 500-504; 0 is nothing; several are alternatives")
	f.StringSliceVar(&filter.Reasons, "reason", nil, "only those with this `reason`, as in the access log; several are alternatives")
	f.DurationVar(&flags.slower, "slower-than", 0, "only those that took at least this long")
	f.BoolVar(&flags.full, "full", false, "only those that waited for a full handshake with the backend")
	f.BoolVar(&flags.resumed, "resumed", false, "only those that waited for a resumed handshake with the backend")
	f.BoolVar(&flags.reused, "reused", false, "only those on a connection to the backend that was there")
	f.StringSliceVar(&flags.misses, "miss-reason", nil, "only those that waited for a full handshake for this `reason`; several are alternatives")
	f.StringVar(&flags.side, "side", "backend", "whose handshakes --full, --resumed, --reused and --miss-reason mean: backend or frontend, which is the client's")
	f.Float64Var(&filter.Sample, "sample", 1, "show this `share` of those that match, chosen at random")
	f.Uint64VarP(&o.limit, "limit", "n", 0, "end when so many were shown (default: at Ctrl-C)")
	_ = cmd.RegisterFlagCompletionFunc("edge", a.completeEdges)
	_ = cmd.RegisterFlagCompletionFunc("side", cobra.FixedCompletions([]string{"backend", "frontend"}, cobra.ShellCompDirectiveNoFileComp))
	_ = cmd.RegisterFlagCompletionFunc("miss-reason", cobra.FixedCompletions(missReasons(), cobra.ShellCompDirectiveNoFileComp))
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if err := flags.fill(filter); err != nil {
			return err
		}
		var err error
		if o.client, err = a.connect(); err != nil {
			return err
		}
		return o.run(cmd.Context())
	}
	return cmd
}

// fill checks the flags and makes them parts of the filter.
func (f *observeFlags) fill(filter *resealv1.RequestFilter) error {
	if filter.Sample <= 0 || filter.Sample > 1 {
		return usagef("--sample must be more than 0 and at most 1")
	}
	if filter.PathPrefix != "" && !strings.HasPrefix(filter.PathPrefix, "/") {
		return usagef("--path must begin with /")
	}
	if f.slower < 0 {
		return usagef("--slower-than must be at least 0s")
	}
	if f.slower > 0 {
		filter.SlowerThan = durationpb.New(f.slower)
	}
	filter.Host = strings.ToLower(strings.TrimSuffix(filter.Host, "."))
	for _, text := range f.statuses {
		r, ok := parseStatuses(text)
		if !ok {
			return usagef("--status: %q is neither a status, such as 503, nor several, such as 5xx or 500-504", text)
		}
		filter.Statuses = append(filter.Statuses, r)
	}
	return f.fillSession(filter)
}

func (f *observeFlags) fillSession(filter *resealv1.RequestFilter) error {
	switch f.side {
	case "backend":
		filter.Side = resealv1.RequestFilter_SIDE_BACKEND
	case "frontend":
		filter.Side = resealv1.RequestFilter_SIDE_FRONTEND
	default:
		return usagef("--side must be backend or frontend")
	}
	several := 0
	for wanted, session := range map[*bool]resealv1.RequestFilter_Session{
		&f.full:    resealv1.RequestFilter_SESSION_FULL,
		&f.resumed: resealv1.RequestFilter_SESSION_RESUMED,
		&f.reused:  resealv1.RequestFilter_SESSION_REUSED,
	} {
		if *wanted {
			several++
			filter.Session = session
		}
	}
	if several > 1 {
		return usagef("only one of --full, --resumed and --reused")
	}
	if len(f.misses) > 0 && (f.resumed || f.reused) {
		return usagef("--miss-reason is of full handshakes: it does not go with --resumed or --reused")
	}
	for _, text := range f.misses {
		reason, ok := missReason(text)
		if !ok {
			return usagef("--miss-reason: there is no %q; there are %s", text, strings.Join(missReasons(), ", "))
		}
		filter.Misses = append(filter.Misses, reason)
	}
	return nil
}

// parseStatuses reads 503, 5xx or 500-504.
func parseStatuses(text string) (*resealv1.StatusRange, bool) {
	lowest, highest, isRange := strings.Cut(text, "-")
	if !isRange {
		lowest, highest = text, text
	}
	if len(text) == 3 && strings.EqualFold(text[1:], "xx") {
		lowest, highest = text[:1]+"00", text[:1]+"99"
	}
	first, err1 := strconv.ParseUint(lowest, 10, 31)
	last, err2 := strconv.ParseUint(highest, 10, 31)
	return &resealv1.StatusRange{First: int32(first), Last: int32(last)}, err1 == nil && err2 == nil && first <= last && last < 1000
}

func missReason(text string) (resealv1.MissReason, bool) {
	for n := range resealv1.MissReason_name {
		if reason := resealv1.MissReason(n); n != 0 && resealv1.Label(reason) == text {
			return reason, true
		}
	}
	return 0, false
}

// missReasons are all of them, in the order of the contract.
func missReasons() []string {
	values := resealv1.MissReason(0).Descriptor().Values()
	var all []string
	for i := 1; i < values.Len(); i++ {
		all = append(all, resealv1.ValueLabel(values.Get(i)))
	}
	return all
}

// run shows what comes until it is enough.
func (o *observeRun) run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := o.client.fleet.ObserveRequests(ctx, o.request)
	for err == nil && (o.limit == 0 || o.shown < o.limit) {
		var response *resealv1.ObserveRequestsResponse
		if response, err = stream.Recv(); err == nil {
			err = o.take(response)
		}
	}
	if o.edges < 0 && err != nil && !errors.Is(err, errInterrupted) {
		return err // it has never begun
	}
	o.sum()
	return untilInterrupted(err)
}

func (o *observeRun) take(response *resealv1.ObserveRequestsResponse) error {
	if fleet := response.GetFleet(); fleet != nil {
		o.takeFleet(fleet)
	}
	if o.dropped == 0 && response.GetDropped() > 0 {
		o.warnf("Note: not all requests are shown: they come faster than edges tell of them, or than they are taken here.\n")
	}
	o.matched, o.dropped = response.GetMatched(), response.GetDropped()
	requests := response.GetRequests()
	if o.limit > 0 {
		requests = requests[:min(uint64(len(requests)), o.limit-o.shown)]
	}
	o.shown += uint64(len(requests))
	if o.format.value != "json" {
		o.rows(requests)
		return nil
	}
	for _, r := range requests {
		if err := o.line(viewObserved(r)); err != nil {
			return err
		}
	}
	return nil
}

// takeFleet says on stderr who takes part, when that changes.
func (o *observeRun) takeFleet(fleet *resealv1.ObservedFleet) {
	o.client.silent.note(fleet)
	silent := map[string]bool{}
	var fresh []string
	for _, edge := range fleet.GetSilentEdges() {
		silent[edge] = true
		if !o.silent[edge] {
			fresh = append(fresh, edge)
		}
	}
	o.silent = silent
	if len(fresh) > 0 {
		o.warnf("Note: these edges do not answer, and their requests are missing: %s\n", joinSome(fresh, 10))
	}
	if fleet.GetEdges() != o.edges {
		o.edges = fleet.GetEdges()
		o.warnf("Observing %s.\n", plural(uint64(o.edges), "edge"))
	}
}

// sum says on stderr what was seen and what was not.
func (o *observeRun) sum() {
	o.warnf("%s matched, %d shown", plural(o.matched, "request"), o.shown)
	if o.dropped > 0 {
		o.warnf("; %d came too fast: a narrower filter or --sample shows an even part", o.dropped)
	}
	o.warnf(".\n")
}

func (o *observeRun) rows(requests []*resealv1.ObservedRequest) {
	wide := o.format.value == "wide"
	if o.table == nil {
		headers := []string{"TIME", "EDGE", "LISTENER", "POOL", "ENDPOINT", "STATUS", "REASON", "CLIENT", "BACKEND", "DURATION", "REQUEST"}
		if wide {
			headers = append(headers, "PROTOCOL", "ROUTE", "ATTEMPTS", "CONNECT", "IN", "OUT", "BLAME", "ERROR")
		}
		o.table = newTable(o.out, headers...)
		// Room for what is likely to come, so that rows stand below each other from the start.
		copy(o.table.widths, []int{12, 8, 8, 8, 18, 6, 12, 16, 16, 8})
	}
	if len(requests) == 0 {
		return
	}
	for _, r := range requests {
		cells := []string{
			r.GetTime().AsTime().Local().Format("15:04:05.000"), r.GetEdge(), orNone(r.GetListener()), orNone(r.GetPool()), orNone(r.GetEndpoint()),
			fmt.Sprint(r.GetStatus()), orNone(r.GetReason()), observedSession(r.GetFrontend()), observedSession(r.GetBackend()),
			roundTime(r.GetDuration()), requestText(r),
		}
		if wide {
			cells = append(cells, orNone(r.GetProtocol()), orNone(r.GetRoute()), fmt.Sprint(r.GetAttempts()), roundTime(r.GetConnect()),
				fmt.Sprint(r.GetBytesIn()), fmt.Sprint(r.GetBytesOut()), orNone(resealv1.Label(r.GetBlame())), orNone(r.GetError()))
		}
		o.table.add(cells...)
	}
	o.table.flush()
}

func roundTime(d *durationpb.Duration) string {
	if d == nil {
		return "<none>"
	}
	return d.AsDuration().Round(100 * time.Microsecond).String()
}

// observedSession says how a request came by a connection.
func observedSession(c *resealv1.ObservedConnection) string {
	switch {
	case c == nil:
		return "<none>"
	case c.GetReused():
		return "reused"
	case c.GetResumed():
		return "resumed"
	case c.GetMiss() == resealv1.MissReason_MISS_REASON_UNSPECIFIED:
		return "full"
	}
	return "full:" + resealv1.Label(c.GetMiss())
}

// observedView is what -o json shows of a request.
type observedView struct {
	Time     string          `json:"time"`
	Edge     string          `json:"edge"`
	Listener string          `json:"listener"`
	Route    string          `json:"route,omitempty"`
	Pool     string          `json:"pool,omitempty"`
	Endpoint string          `json:"endpoint,omitempty"`
	Protocol string          `json:"protocol,omitempty"`
	Method   string          `json:"method,omitempty"`
	Host     string          `json:"host,omitempty"`
	Path     string          `json:"path,omitempty"`
	Status   int32           `json:"status"`
	Reason   string          `json:"reason,omitempty"`
	Blame    string          `json:"blame,omitempty"`
	Error    string          `json:"error,omitempty"`
	Duration string          `json:"duration"`
	Attempts int32           `json:"attempts"`
	Connect  string          `json:"connect,omitempty"`
	BytesIn  int64           `json:"bytesIn"`
	BytesOut int64           `json:"bytesOut"`
	Frontend *connectionView `json:"frontend,omitempty"`
	Backend  *connectionView `json:"backend,omitempty"`
}

type connectionView struct {
	Reused  bool   `json:"reused"`
	Resumed bool   `json:"resumed"`
	Miss    string `json:"miss,omitempty"`
}

func viewObserved(r *resealv1.ObservedRequest) observedView {
	view := observedView{
		Time: utcStamp(r.GetTime()), Edge: r.GetEdge(), Listener: r.GetListener(), Route: r.GetRoute(), Pool: r.GetPool(),
		Endpoint: r.GetEndpoint(), Protocol: r.GetProtocol(), Method: r.GetMethod(), Host: r.GetHost(), Path: r.GetPath(),
		Status: r.GetStatus(), Reason: r.GetReason(), Blame: resealv1.Label(r.GetBlame()), Error: r.GetError(),
		Duration: r.GetDuration().AsDuration().String(), Attempts: r.GetAttempts(), BytesIn: r.GetBytesIn(), BytesOut: r.GetBytesOut(),
		Frontend: viewConnection(r.GetFrontend()), Backend: viewConnection(r.GetBackend()),
	}
	if r.GetConnect() != nil {
		view.Connect = r.GetConnect().AsDuration().String()
	}
	return view
}

func viewConnection(c *resealv1.ObservedConnection) *connectionView {
	if c == nil {
		return nil
	}
	return &connectionView{c.GetReused(), c.GetResumed(), resealv1.Label(c.GetMiss())}
}

// line writes one line of JSON.
func (o *observeRun) line(v any) error {
	var data bytes.Buffer
	encoder := json.NewEncoder(&data)
	encoder.SetEscapeHTML(false)
	if err := encoder.Encode(v); err != nil {
		return err
	}
	return o.writeJSON(data.Bytes())
}
