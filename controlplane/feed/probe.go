package feed

import (
	"context"
	"net"
	"slices"
	"strconv"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

const (
	// probeTimeout bounds the wait for an edge's report.
	probeTimeout = time.Minute
	// maxProbeIdle leaves the edge half of that for its connections.
	maxProbeIdle = 30 * time.Second
)

// probing is the probe that runs on a stream's edge, at most one.
type probing struct {
	mu     sync.Mutex
	id     uint64                     // of the newest order
	report chan *resealv1.ProbeReport // nil: none runs
}

// begin takes the edge for one probe. ok is false while another one runs.
func (p *probing) begin() (id uint64, report <-chan *resealv1.ProbeReport, ok bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.report != nil {
		return 0, nil, false
	}
	p.id++
	p.report = make(chan *resealv1.ProbeReport, 1)
	return p.id, p.report, true
}

func (p *probing) end() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.report = nil
}

// answer takes the edge's report. One that nobody waits for any more is dropped.
func (p *probing) answer(report *resealv1.ProbeReport) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.report == nil || report.GetId() != p.id {
		return
	}
	select {
	case p.report <- report:
	default: // it has answered already
	}
}

// ProbeBackend implements resealv1.FleetServiceServer.
func (s *Server) ProbeBackend(ctx context.Context, request *resealv1.ProbeBackendRequest) (*resealv1.ProbeBackendResponse, error) {
	if err := s.checkProbe(request); err != nil {
		return nil, err
	}
	stream := s.table.stream(request.GetEdge())
	if stream == nil {
		return nil, status.Errorf(codes.NotFound, "edge %q: %s", request.GetEdge(), errNotConnected)
	}
	id, report, ok := stream.probing.begin()
	if !ok {
		return nil, status.Errorf(codes.ResourceExhausted, "another probe runs on edge %q: try again when it is done", request.GetEdge())
	}
	defer stream.probing.end()
	order := proto.CloneOf(request.GetOrder())
	order.Id = id
	s.config.Logger.Info("edge told to probe", "edge", request.GetEdge(), "pool", order.GetPool(), "address", order.GetAddress())
	return s.awaitReport(ctx, stream, order, report)
}

// awaitReport gives the order to the edge and waits for what it finds out.
func (s *Server) awaitReport(ctx context.Context, stream *session, probe *resealv1.ProbeOrder, reports <-chan *resealv1.ProbeReport) (*resealv1.ProbeBackendResponse, error) {
	timeout := time.NewTimer(probeTimeout)
	defer timeout.Stop()
	message := &resealv1.SyncResponse{Message: &resealv1.SyncResponse_ProbeOrder{ProbeOrder: probe}}
	if !stream.order(order{message, nil}) {
		return nil, status.Errorf(codes.ResourceExhausted, "edge %q has not read earlier orders yet", stream.id)
	}
	select {
	case report := <-reports:
		return reported(stream.id, report)
	case <-timeout.C:
		return nil, status.Errorf(codes.Unavailable, "edge %q did not report within %s: is its version one that can probe?", stream.id, probeTimeout)
	case <-stream.done:
		select {
		case report := <-reports: // it came last of all
			return reported(stream.id, report)
		default:
		}
		return nil, status.Errorf(codes.Unavailable, "edge %q left before it could report", stream.id)
	case <-ctx.Done():
		return nil, status.FromContextError(ctx.Err()).Err()
	}
}

func reported(edge string, report *resealv1.ProbeReport) (*resealv1.ProbeBackendResponse, error) {
	if report.GetError() != "" {
		return nil, status.Errorf(codes.FailedPrecondition, "edge %q: %s", edge, shown(report.GetError(), maxDescription))
	}
	if err := boundReport(report); err != nil {
		return nil, status.Errorf(codes.ResourceExhausted, "edge %q: %v", edge, err)
	}
	return &resealv1.ProbeBackendResponse{Report: report}, nil
}

// checkProbe admits orders for endpoints of pools alone: an edge is not a scanner.
func (s *Server) checkProbe(request *resealv1.ProbeBackendRequest) error {
	order := request.GetOrder()
	for field, text := range map[string]string{"edge": request.GetEdge(), "order.pool": order.GetPool(), "order.address": order.GetAddress()} {
		if text == "" {
			return status.Errorf(codes.InvalidArgument, "%s: must be set", field)
		}
	}
	for field, text := range map[string]string{"order.server_name": order.GetServerName(), "order.path": order.GetPath()} {
		if len(text) > maxDescription {
			return status.Errorf(codes.InvalidArgument, "%s: has %d bytes, at most %d are allowed", field, len(text), maxDescription)
		}
	}
	if idle := order.GetIdle(); idle != nil && (idle.CheckValid() != nil || idle.AsDuration() < 0 || idle.AsDuration() > maxProbeIdle) {
		return status.Errorf(codes.InvalidArgument, "order.idle: must be from 0s to %s", maxProbeIdle)
	}
	resource := s.config.Source.Snapshot().Get("BackendPool", order.GetPool())
	if resource == nil {
		return status.Errorf(codes.NotFound, "backendpool %q not found", order.GetPool())
	}
	if !isEndpoint(resource.GetBackendPool(), order.GetAddress()) {
		return status.Errorf(codes.InvalidArgument, "order.address: %q is not an endpoint of backendpool %q, and nothing else may be probed", order.GetAddress(), order.GetPool())
	}
	return nil
}

func isEndpoint(pool *resealv1.BackendPool, address string) bool {
	if dns := pool.GetDns(); dns != nil && address == net.JoinHostPort(dns.GetName(), strconv.FormatUint(uint64(dns.GetPort()), 10)) {
		return true
	}
	return slices.ContainsFunc(pool.GetEndpoints(), func(e *resealv1.Endpoint) bool { return e.GetAddress() == address })
}

// stream returns the stream of an edge, or nil when it is not connected.
func (t *table) stream(id string) *session {
	t.mu.Lock()
	defer t.mu.Unlock()
	if row := t.edges[id]; row != nil {
		return row.stream
	}
	return nil
}
