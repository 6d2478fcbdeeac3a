package tally

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"

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
	requests := make(chan uint64)
	group.Go(func() error { return listen(ctx, stream, requests) })
	group.Go(func() error {
		err := r.report(ctx, stream, requests)
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
func listen(ctx context.Context, stream reportStream, requests chan<- uint64) error {
	for {
		response, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return errEnded
		}
		if err != nil {
			return err
		}
		select {
		case requests <- response.GetRequest():
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func (r *Reporter) report(ctx context.Context, stream reportStream, requests <-chan uint64) error {
	ticker := time.NewTicker(reportInterval)
	defer ticker.Stop()
	var answers uint64
	for {
		if err := stream.Send(r.config.Tally.Report(r.config.Edge, r.config.BootID, answers)); err != nil {
			return err
		}
		select {
		case request := <-requests:
			answers = max(answers, request)
		case <-ticker.C:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}
