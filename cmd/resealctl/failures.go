package main

import (
	"context"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// failuresPoll is the time between two looks with --watch.
const failuresPoll = 2 * time.Second

// failuresRun is one run of get failures.
type failuresRun struct {
	*app
	client  *client
	request *resealv1.ListFailuresRequest
	format  *format
}

func newGetFailuresCommand(a *app) *cobra.Command {
	f := &failuresRun{app: a, request: &resealv1.ListFailuresRequest{}}
	var watch bool
	cmd := &cobra.Command{
		Use:   "failures",
		Short: "Show the last requests that edges could not serve well",
		Long: `Show the last requests that edges could not serve well, the newest last: what was
answered with 5xx or ended early, with the reason and who is to blame. What clients
alone did wrong (4xx) is not among them. Each connected edge is asked for what it
remembers, the newest 128 since its process started. Queries of URLs are left out,
but hosts and paths are shown, so it takes the role operator.`,
		Example: "  resealctl get failures --pool jetty\n  resealctl get failures --edge edge-1 -o json\n  resealctl get failures -w",
		Args:    cobra.NoArgs,
	}
	f.format = registerFormat(cmd, "table", "wide", "yaml", "json")
	cmd.Flags().StringVar(&f.request.Edge, "edge", "", "only those of this `edge`")
	cmd.Flags().StringVar(&f.request.Pool, "pool", "", "only those of this `pool`")
	cmd.Flags().StringVar(&f.request.Listener, "listener", "", "only those of this `listener`")
	cmd.Flags().Int32Var(&f.request.Limit, "limit", resealv1.DefaultFailures, fmt.Sprintf("how many to show at most, up to %d", resealv1.MaxFailures))
	cmd.Flags().BoolVarP(&watch, "watch", "w", false, "stay and show those that come")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if f.request.Limit < 1 || f.request.Limit > resealv1.MaxFailures {
			return usagef("--limit must be from 1 to %d", resealv1.MaxFailures)
		}
		if watch && f.format.structured() {
			return usagef("either --watch or -o %s, not both", f.format)
		}
		var err error
		if f.client, err = a.connect(); err != nil {
			return err
		}
		if watch {
			return f.watch(cmd.Context())
		}
		response, err := f.client.fleet.ListFailures(cmd.Context(), f.request)
		if err != nil {
			return err
		}
		return f.show(response)
	}
	return cmd
}

func (f *failuresRun) show(response *resealv1.ListFailuresResponse) error {
	if f.format.structured() {
		return f.printDocument(f.format, viewFailures(response))
	}
	f.noteSilent(response)
	if len(response.GetFailures()) == 0 {
		f.warnf("No failures found.\n")
		return nil
	}
	f.rows(response.GetFailures())
	return nil
}

// noteSilent says on stderr whose failures are missing.
func (f *failuresRun) noteSilent(response *resealv1.ListFailuresResponse) {
	if silent := response.GetSilentEdges(); len(silent) > 0 {
		f.warnf("Note: these edges did not answer, and their failures are missing: %s\n", joinSome(silent, 10))
	}
}

func (f *failuresRun) rows(failures []*resealv1.Failure) {
	wide := f.format.value == "wide"
	headers := []string{"TIME", "EDGE", "LISTENER", "POOL", "ENDPOINT", "STATUS", "REASON", "BLAME", "SESSION", "DURATION", "REQUEST"}
	if wide {
		headers = append(headers, "ROUTE", "ATTEMPTS", "REQUEST ID", "ERROR")
	}
	t := newTable(f.out, headers...)
	for _, failure := range failures {
		cells := []string{
			failure.GetTime().AsTime().Local().Format("15:04:05.000"), failure.GetEdge(), orNone(failure.GetListener()), orNone(failure.GetPool()),
			orNone(failure.GetEndpoint()), fmt.Sprint(failure.GetStatus()), orNone(failure.GetReason()), orNone(resealv1.Label(failure.GetBlame())),
			sessionText(failure), failure.GetDuration().AsDuration().Round(time.Millisecond).String(), requestText(failure),
		}
		if wide {
			cells = append(cells, orNone(failure.GetRoute()), fmt.Sprint(failure.GetAttempts()), orNone(failure.GetRequestId()), orNone(failure.GetError()))
		}
		t.add(cells...)
	}
	t.flush()
}

// sessionText says what the connection to the backend cost.
func sessionText(failure *resealv1.Failure) string {
	switch {
	case failure.GetReused():
		return "reused"
	case failure.GetResumed():
		return "resumed"
	case failure.GetMiss() != resealv1.MissReason_MISS_REASON_UNSPECIFIED:
		return "full:" + resealv1.Label(failure.GetMiss())
	}
	return "<none>"
}

// requestText is what was asked for, of a connection of protocol tls its SNI.
func requestText(request interface {
	GetMethod() string
	GetHost() string
	GetPath() string
}) string {
	if request.GetMethod() == "" {
		return orNone(request.GetHost())
	}
	return request.GetMethod() + " " + request.GetHost() + request.GetPath()
}

// watch shows what there is, and then what comes, until it is interrupted.
func (f *failuresRun) watch(ctx context.Context) error {
	shown := map[string]bool{}
	ticker := time.NewTicker(failuresPoll)
	defer ticker.Stop()
	for {
		response, err := f.client.fleet.ListFailures(ctx, f.request)
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return err
		}
		f.noteSilent(response)
		now := map[string]bool{}
		var fresh []*resealv1.Failure
		for _, failure := range response.GetFailures() {
			key := fmt.Sprint(failure)
			now[key] = true
			if !shown[key] {
				fresh = append(fresh, failure)
			}
		}
		shown = now
		if len(fresh) > 0 {
			f.rows(fresh)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
		}
	}
}

// failuresView is what -o json and yaml show.
type failuresView struct {
	Failures    []failureView    `json:"failures"`
	SilentEdges []string         `json:"silentEdges,omitempty"`
	Unanswered  []unansweredView `json:"unanswered,omitempty"`
}

type failureView struct {
	Time      string `json:"time"`
	Edge      string `json:"edge"`
	RequestID string `json:"requestId,omitempty"`
	Listener  string `json:"listener"`
	Route     string `json:"route,omitempty"`
	Pool      string `json:"pool,omitempty"`
	Endpoint  string `json:"endpoint,omitempty"`
	Status    int32  `json:"status"`
	Reason    string `json:"reason,omitempty"`
	Blame     string `json:"blame,omitempty"`
	Reused    bool   `json:"reused"`
	Resumed   bool   `json:"resumed"`
	Miss      string `json:"miss,omitempty"`
	Duration  string `json:"duration"`
	Attempts  int32  `json:"attempts"`
	Method    string `json:"method,omitempty"`
	Host      string `json:"host,omitempty"`
	Path      string `json:"path,omitempty"`
	Error     string `json:"error,omitempty"`
}

func viewFailures(response *resealv1.ListFailuresResponse) failuresView {
	view := failuresView{Failures: []failureView{}, SilentEdges: response.GetSilentEdges(), Unanswered: viewUnanswered(response.GetUnanswered())}
	for _, f := range response.GetFailures() {
		view.Failures = append(view.Failures, failureView{
			Time: utcStamp(f.GetTime()), Edge: f.GetEdge(), RequestID: f.GetRequestId(), Listener: f.GetListener(), Route: f.GetRoute(),
			Pool: f.GetPool(), Endpoint: f.GetEndpoint(), Status: f.GetStatus(), Reason: f.GetReason(), Blame: resealv1.Label(f.GetBlame()),
			Reused: f.GetReused(), Resumed: f.GetResumed(), Miss: resealv1.Label(f.GetMiss()), Duration: f.GetDuration().AsDuration().String(),
			Attempts: f.GetAttempts(), Method: f.GetMethod(), Host: f.GetHost(), Path: f.GetPath(), Error: f.GetError(),
		})
	}
	return view
}
