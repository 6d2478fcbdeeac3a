package fleet

import (
	"testing"

	"google.golang.org/grpc/encoding"
	"google.golang.org/protobuf/proto"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

func TestCodec(t *testing.T) {
	response := &resealv1.SyncResponse{Message: &resealv1.SyncResponse_Update{Update: &resealv1.Update{Revision: 7, ClusterId: "c"}}}
	wire, err := proto.Marshal(response)
	if err != nil {
		t.Fatal(err)
	}
	ready := &Prepared{response, wire}
	got, err := Codec{}.Marshal(ready)
	if err != nil || len(got) != 1 || &got[0].ReadOnlyData()[0] != &wire[0] {
		t.Errorf("a prepared update is not sent as it is: %v, %v", got, err)
	}
	// Any other codec sees the message.
	if got, err = encoding.GetCodecV2("proto").Marshal(ready); err != nil || string(got.Materialize()) != string(wire) {
		t.Errorf("gRPC's codec makes %x of it, %v", got.Materialize(), err)
	}
	if got, err = (Codec{}).Marshal(response); err != nil {
		t.Fatal(err)
	}
	back := &resealv1.SyncResponse{}
	if err := (Codec{}).Unmarshal(got, back); err != nil || !proto.Equal(back, response) {
		t.Errorf("round trip gives %v, %v", back, err)
	}
	if _, err := (Codec{}).Marshal("text"); err == nil {
		t.Error("a string was marshalled")
	}
	if (Codec{}).Name() != "proto" {
		t.Error("the name changes the content type")
	}
}
