package main

import (
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

func fakeObserved() []*resealv1.ObservedRequest {
	at := func(second int) *timestamppb.Timestamp {
		return timestamppb.New(fakeEpoch.Add(time.Duration(second) * time.Second))
	}
	return []*resealv1.ObservedRequest{
		{
			Time: at(0), Edge: "edge-1", Listener: "web", Route: "all", Pool: "jetty", Endpoint: "10.0.0.9:443", Protocol: "HTTP/2.0",
			Method: "GET", Host: "app.test", Path: "/a<b>", Status: 200, Duration: durationpb.New(12345678), Attempts: 1,
			Connect: durationpb.New(4 * time.Millisecond), BytesIn: 3, BytesOut: 4711,
			Frontend: &resealv1.ObservedConnection{Resumed: true},
			Backend:  &resealv1.ObservedConnection{Miss: resealv1.MissReason_MISS_REASON_DECLINED},
		},
		{
			Time: at(1), Edge: "edge-2", Listener: "web", Pool: "jetty", Method: "GET", Host: "app.test", Path: "/b", Status: 503, Reason: "no_endpoint",
			Blame: resealv1.Failure_BLAME_EDGE, Error: "no endpoint is healthy", Duration: durationpb.New(time.Millisecond), Protocol: "HTTP/1.1",
			Frontend: &resealv1.ObservedConnection{Reused: true},
		},
		{
			Time: at(2), Edge: "edge-2", Listener: "raw", Pool: "smtp", Endpoint: "10.0.0.8:465", Protocol: "tls", Host: "mail.test", Duration: durationpb.New(time.Hour),
			Frontend: &resealv1.ObservedConnection{Miss: resealv1.MissReason_MISS_REASON_NOT_OFFERED},
			Backend:  &resealv1.ObservedConnection{Resumed: true},
		},
	}
}

// ObserveRequests sends three requests, of which 7 matched, and waits. The requests of
// the edge "echo" have the filter as their path; edge-9 is not connected.
func (f *fakeServer) ObserveRequests(req *resealv1.ObserveRequestsRequest, stream grpc.ServerStreamingServer[resealv1.ObserveRequestsResponse]) error {
	if req.GetEdge() == "edge-9" {
		return status.Error(codes.NotFound, `edge "edge-9": the edge is not connected`)
	}
	fleet := &resealv1.ObservedFleet{Edges: 2, SilentEdges: []string{"edge-3"}}
	requests := fakeObserved()
	if req.GetEdge() == "echo" {
		filter, err := protojson.MarshalOptions{UseProtoNames: false}.Marshal(req.GetFilter())
		if err != nil {
			return err
		}
		requests = []*resealv1.ObservedRequest{{Edge: "echo", Path: string(filter)}}
	}
	first := true
	return f.watch(stream.Context(), func() error {
		fleet.Unanswered = f.unanswered
		for _, response := range []*resealv1.ObserveRequestsResponse{
			{Fleet: fleet},
			{Requests: requests[:1], Matched: 1},
			{Requests: requests[1:], Matched: 7, Dropped: 4},
		} {
			if err := stream.Send(response); err != nil {
				return err
			}
			if !first {
				return nil
			}
		}
		first = false
		return nil
	})
}
