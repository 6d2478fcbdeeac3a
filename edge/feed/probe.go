package feed

import (
	"context"
	"time"

	"github.com/reseal/reseal/edge/exchange"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// probeTimeout bounds a probe. The control plane waits a little longer.
const probeTimeout = 55 * time.Second

// probe starts a probe, which must not hold up Updates. It returns the answer
// when there is no probe to wait for.
func (s *session) probe(ctx context.Context, order *resealv1.ProbeOrder) *resealv1.SyncRequest {
	switch {
	case s.feed.config.Probe == nil:
		return probeAnswer(refuseProbe(order, "it does not probe"))
	case s.probing:
		return probeAnswer(refuseProbe(order, "another probe runs on it: try again when it is done"))
	}
	s.probing = true
	s.group.Go(func() error {
		bounded, cancel := context.WithTimeout(ctx, probeTimeout)
		defer cancel()
		var report *resealv1.ProbeReport
		err := exchange.Guard("a backend was probed", func() error {
			report = s.feed.config.Probe(bounded, order)
			return nil
		})
		switch {
		case err != nil:
			report = refuseProbe(order, err.Error())
		case report == nil:
			report = refuseProbe(order, "it does not probe this")
		}
		report.Id = order.GetId()
		select {
		case s.probed <- report:
		case <-ctx.Done():
		}
		return nil
	})
	return nil
}

func refuseProbe(order *resealv1.ProbeOrder, why string) *resealv1.ProbeReport {
	return &resealv1.ProbeReport{Id: order.GetId(), Error: why}
}

func probeAnswer(report *resealv1.ProbeReport) *resealv1.SyncRequest {
	return &resealv1.SyncRequest{Message: &resealv1.SyncRequest_ProbeReport{ProbeReport: report}}
}
