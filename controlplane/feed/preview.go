package feed

import (
	"context"
	"fmt"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/reseal/reseal/controlplane/fleet"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

const (
	// previewTimeout bounds the wait for what edges say of a change.
	previewTimeout = 5 * time.Second
	// maxImpact bounds what one edge says of it, in bytes.
	maxImpact = 512 << 10
)

// candidate is what one edge is to preview.
type candidate struct {
	message *fleet.Prepared // the PreviewResponse
	impact  chan *resealv1.EdgeImpact
}

// previewing is the preview that runs on a stream's edge, at most one.
type previewing struct {
	mu  sync.Mutex
	id  uint64 // of the newest order
	now *candidate
}

// begin takes the edge for one preview. ok is false while another one runs.
func (p *previewing) begin(c *candidate) (id uint64, ok bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.now != nil {
		return 0, false
	}
	p.id++
	p.now = c
	return p.id, true
}

func (p *previewing) end() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.now = nil
}

// find returns the candidate of an order, nil when nobody waits for it any more.
func (p *previewing) find(id uint64) *candidate {
	p.mu.Lock()
	defer p.mu.Unlock()
	if id != p.id {
		return nil
	}
	return p.now
}

// PreviewEdges asks edges that are connected to this replica what snapshot would do to
// them, all at once, for 5 s at most. One that can't tell says why. The error is a gRPC
// status: another preview runs, or the snapshot can't be sent.
func (s *Server) PreviewEdges(ctx context.Context, snapshot *resealv1.Snapshot, ids []string) ([]*resealv1.EdgeImpact, error) {
	select {
	case s.previewing <- struct{}{}:
		defer func() { <-s.previewing }()
	default:
		return nil, status.Error(codes.ResourceExhausted, "another preview runs: try again when it is done")
	}
	ctx, cancel := context.WithTimeout(ctx, previewTimeout)
	defer cancel()
	s.mu.Lock()
	g := newGeneration(snapshot, s.encoder, time.Now())
	s.mu.Unlock()
	messages := map[*view]*fleet.Prepared{}
	impacts := make([]*resealv1.EdgeImpact, len(ids))
	var all sync.WaitGroup
	defer all.Wait()
	for i, id := range ids {
		stream := s.table.stream(id)
		if why := cantPreview(stream); why != "" {
			impacts[i] = &resealv1.EdgeImpact{Edge: id, Unknown: why}
			continue
		}
		wanted, err := g.view(stream.labels, g.encoder.pastForm)
		if err == nil && messages[wanted] == nil {
			messages[wanted], err = previewMessage(wanted)
		}
		if err != nil {
			s.config.Logger.Error("a candidate can't be sent", "edge", id, "error", err)
			return nil, status.Error(codes.Internal, "the change can't be encoded, see the control plane's log")
		}
		message := messages[wanted]
		all.Go(func() { impacts[i] = stream.preview(ctx, message) })
	}
	all.Wait()
	return impacts, nil
}

// cantPreview says why an edge can't be asked, "" if it can.
func cantPreview(stream *session) string {
	switch {
	case stream == nil:
		return "it is not connected any more"
	case !stream.previews.Load():
		return "its version does not preview changes"
	}
	return ""
}

// previewMessage is the candidate as all edges that would hold it get it.
func previewMessage(v *view) (*fleet.Prepared, error) {
	response := &resealv1.PreviewResponse{Update: &resealv1.Update{
		ClusterId: v.clusterID, Revision: v.revision, Hash: v.hash, Upserts: v.held,
	}}
	wire, err := marshalDeterministic(response)
	if err != nil {
		return nil, err
	}
	if len(wire) > MaxUpdate {
		return nil, fmt.Errorf("it needs %d bytes, at most %d are sent", len(wire), MaxUpdate)
	}
	return &fleet.Prepared{Message: response, Wire: wire}, nil
}

// preview has the stream's edge preview a candidate.
func (c *session) preview(ctx context.Context, message *fleet.Prepared) *resealv1.EdgeImpact {
	unknown := func(why string) *resealv1.EdgeImpact { return &resealv1.EdgeImpact{Edge: c.id, Unknown: why} }
	wanted := &candidate{message: message, impact: make(chan *resealv1.EdgeImpact, 1)}
	id, ok := c.previewing.begin(wanted)
	if !ok {
		return unknown("another preview runs on it")
	}
	defer c.previewing.end()
	if !c.order(order{message: &resealv1.SyncResponse{Message: &resealv1.SyncResponse_PreviewOrder{PreviewOrder: &resealv1.PreviewOrder{Id: id}}}}) {
		return unknown("it has not read earlier orders yet")
	}
	select {
	case impact := <-wanted.impact:
		return boundImpact(c.id, impact)
	case <-c.done:
		return unknown("it left before it could tell")
	case <-ctx.Done():
		return unknown(fmt.Sprintf("it did not answer within %s", previewTimeout))
	}
}

// boundImpact checks and changes what an edge says so that it can be shown to people.
func boundImpact(id string, impact *resealv1.EdgeImpact) *resealv1.EdgeImpact {
	if proto.Size(impact) > maxImpact {
		return &resealv1.EdgeImpact{Edge: id, Unknown: "it says too much"}
	}
	makeVisible(impact.ProtoReflect())
	impact.Edge = id
	return impact
}

// Preview implements resealv1.PreviewServiceServer.
func (s *Previewer) Preview(stream grpc.BidiStreamingServer[resealv1.PreviewRequest, resealv1.PreviewResponse]) error {
	return s.Service().Serve(stream)
}

// Previewer is the PreviewService of a Server.
type Previewer struct {
	resealv1.UnimplementedPreviewServiceServer
	server *Server
	lines  *fleet.Lines
}

// Previewer returns the PreviewService.
func (s *Server) Previewer() *Previewer { return &Previewer{server: s, lines: s.lines} }

// Service are the conversations in which edges preview.
func (s *Previewer) Service() fleet.Service {
	return fleet.Service{Lines: s.lines, Open: s.open, Message: func() proto.Message { return &resealv1.PreviewRequest{} }}
}

func (s *Previewer) open(ctx context.Context, line *fleet.Line) (fleet.Conversation, error) {
	id, _, err := s.server.config.Edge(ctx)
	if err != nil {
		return nil, fleet.Denied(err)
	}
	c := &preview{server: s.server, line: line, id: id}
	c.deadline = time.AfterFunc(previewTimeout, func() {
		line.End(status.Errorf(codes.DeadlineExceeded, "the preview took longer than %s", previewTimeout))
	})
	return c, nil
}

// preview is the conversation of one preview.
type preview struct {
	server   *Server
	line     *fleet.Line
	id       string
	deadline *time.Timer
	wanted   *candidate // nil: the edge has not said what it is about
	sent     bool
}

// Take implements fleet.Conversation.
func (c *preview) Take(said proto.Message) (time.Duration, error) {
	message := said.(*resealv1.PreviewRequest)
	start, impact := message.GetStart(), message.GetImpact()
	switch {
	case start != nil && c.wanted == nil:
		if err := fleet.CheckID(start.GetEdge(), c.id); err != nil {
			return 0, err
		}
		if stream := c.server.table.stream(c.id); stream != nil {
			c.wanted = stream.previewing.find(start.GetId())
		}
		if c.wanted == nil {
			return 0, status.Error(codes.NotFound, "nobody waits for this preview any more")
		}
		c.line.Wake()
		return 0, nil
	case impact != nil && c.sent:
		select {
		case c.wanted.impact <- impact:
		default:
		}
		c.line.End(nil)
		return 0, nil
	}
	return 0, status.Error(codes.InvalidArgument, "want a PreviewStart, then an EdgeImpact")
}

// Next implements fleet.Conversation.
func (c *preview) Next() (fleet.Outgoing, error) {
	if c.wanted == nil || c.sent {
		return fleet.Outgoing{}, nil
	}
	c.sent = true
	return fleet.Outgoing{Message: c.wanted.message}, nil
}

// Close implements fleet.Conversation.
func (c *preview) Close() { c.deadline.Stop() }
