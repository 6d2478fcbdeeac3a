package tally

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	"github.com/reseal/reseal/edge/exchange"
	"github.com/reseal/reseal/edge/link"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// reportInterval keeps the contract's 5 s even when the network is slow.
const reportInterval = 4 * time.Second

var errEnded = errors.New("the control plane ended the stream")

// ReporterConfig is what a Reporter needs. It is read once, by NewReporter.
type ReporterConfig struct {
	// Edge is the edge's id, as in its certificate. Required.
	Edge string
	// BootID is random per start of the process. Required.
	BootID string
	// Tally is what to report. Required.
	Tally *Tally
	// Client calls the control plane. Required.
	Client resealv1.TallyServiceClient
	// Logger is for the operator of this process. Required.
	Logger *slog.Logger
}

// Reporter sends the counters to the control plane.
type Reporter struct{ config ReporterConfig }

// NewReporter makes a reporter that does nothing before Run.
func NewReporter(config ReporterConfig) *Reporter { return &Reporter{config} }

// Run reports every few seconds and when asked, until ctx ends. An unreachable
// control plane is not an error. It returns nil.
func (r *Reporter) Run(ctx context.Context) error {
	link.Keep(ctx, r.serve, func(err error, again time.Duration) {
		r.config.Logger.Debug("reports are interrupted", "error", err, "again_in", again)
	})
	return nil
}

// serve runs one stream to its end.
func (r *Reporter) serve(ctx context.Context) error {
	group, ctx := errgroup.WithContext(ctx)
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := r.config.Client.Report(ctx)
	if err != nil {
		return err
	}
	responses := make(chan *resealv1.ReportResponse)
	group.Go(func() error { return listen(ctx, stream, responses) })
	group.Go(func() error {
		err := exchange.Guard("counters were reported", func() error { return r.report(ctx, stream, responses) })
		if errors.Is(err, io.EOF) {
			// The stream broke under a send. Why is what listen returns.
			return nil
		}
		return err
	})
	return group.Wait()
}

type reportStream = grpc.BidiStreamingClient[resealv1.ReportRequest, resealv1.ReportResponse]

// listen always returns an error.
func listen(ctx context.Context, stream reportStream, responses chan<- *resealv1.ReportResponse) error {
	for {
		response, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return errEnded
		}
		if err != nil {
			return err
		}
		select {
		case responses <- response:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// report sends all counters, and then, to a control plane that can add them up, those
// that have changed.
func (r *Reporter) report(ctx context.Context, stream reportStream, responses <-chan *resealv1.ReportResponse) error {
	ticker := time.NewTicker(reportInterval)
	defer ticker.Stop()
	var answers uint64
	var before *resealv1.ReportRequest // nil: none was sent
	partial := false                   // the control plane takes such reports
	for {
		report := r.config.Tally.Report(r.config.Edge, r.config.BootID, answers)
		next := report
		if partial && before != nil {
			next = since(before, report)
		}
		if err := stream.Send(next); err != nil {
			return err
		}
		before = report
		for due := false; !due; {
			select {
			case response := <-responses:
				partial = partial || response.GetTakesPartial()
				answers = max(answers, response.GetRequest())
				due = response.GetRequest() > 0
			case <-ticker.C:
				due = true
			case <-ctx.Done():
				return ctx.Err()
			}
		}
	}
}

// since is what of a report differs from the one before; all of it when something is
// gone.
func since(before, report *resealv1.ReportRequest) *resealv1.ReportRequest {
	pools, poolsStand := changed(before.GetPools(), report.GetPools())
	listeners, listenersStand := changed(before.GetListeners(), report.GetListeners())
	if !poolsStand || !listenersStand {
		return report
	}
	return &resealv1.ReportRequest{
		Edge: report.GetEdge(), BootId: report.GetBootId(), Answers: report.GetAnswers(), Time: report.GetTime(),
		Partial: true, Pools: pools, Listeners: listeners,
	}
}

// changed are those of now that are not as before; stand is false when one of before
// is gone. Both lists are sorted by name.
func changed(before, now []*resealv1.Stats) (differ []*resealv1.Stats, stand bool) {
	for _, stats := range now {
		if len(before) > 0 && before[0].GetName() == stats.GetName() {
			same := proto.Equal(before[0], stats)
			before = before[1:]
			if same {
				continue
			}
		}
		differ = append(differ, stats)
	}
	return differ, len(before) == 0
}
