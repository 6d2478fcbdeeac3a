package trust

import (
	"context"
	"strings"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/tap"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// allowedRoles reads the allow option of every method of package reseal.v1.
func allowedRoles() map[string][]resealv1.Role {
	methods := map[string][]resealv1.Role{}
	protoregistry.GlobalFiles.RangeFilesByPackage("reseal.v1", func(file protoreflect.FileDescriptor) bool {
		for i := range file.Services().Len() {
			service := file.Services().Get(i)
			for j := range service.Methods().Len() {
				method := service.Methods().Get(j)
				roles, _ := proto.GetExtension(method.Options(), resealv1.E_Allow).([]resealv1.Role)
				methods["/"+string(service.FullName())+"/"+string(method.Name())] = roles
			}
		}
		return true
	})
	return methods
}

// admits tells whether a method with the given allow option admits role. An
// operator may do what a viewer may, an admin what an operator may; the other roles
// have no order.
func admits(allow []resealv1.Role, role resealv1.Role) bool {
	for _, allowed := range allow {
		switch {
		case allowed == resealv1.Role_ROLE_UNSPECIFIED:
		case role == allowed:
			return true
		case allowed >= resealv1.Role_ROLE_VIEWER && role > allowed && role <= resealv1.Role_ROLE_ADMIN:
			return true
		}
	}
	return false
}

// UnaryInterceptor lets a call pass if its method admits the caller, and puts
// the caller into the context for Caller. Health is open to everybody,
// reflection to everybody with a role; a method that is neither one of
// these nor has an allow option admits nobody.
func (t *Trust) UnaryInterceptor(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	ctx, err := t.authorise(ctx, info.FullMethod)
	if err != nil {
		return nil, err
	}
	return handler(ctx, req)
}

// StreamInterceptor is UnaryInterceptor for streams. One whose caller is revoked
// ends.
func (t *Trust) StreamInterceptor(srv any, stream grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
	ctx, err := t.authorise(stream.Context(), info.FullMethod)
	if err != nil {
		return err
	}
	ctx, ended := t.bounded(ctx)
	return ended(handler(srv, &authorisedStream{ServerStream: stream, ctx: ctx}))
}

// Tap is what the interceptors do, but before a request is read: as the
// server's InTapHandle it saves the work of decoding what is refused anyway. It
// does not replace the interceptors.
func (t *Trust) Tap(ctx context.Context, info *tap.Info) (context.Context, error) {
	if _, err := t.authorise(ctx, info.FullMethodName); err != nil {
		return nil, err
	}
	return ctx, nil
}

type authorisedStream struct {
	grpc.ServerStream
	ctx context.Context
}

func (s *authorisedStream) Context() context.Context { return s.ctx }

// authorise decides about a call, and tells of those that are refused.
func (t *Trust) authorise(ctx context.Context, fullMethod string) (context.Context, error) {
	who, err := t.identify(ctx)
	admitted, refusal := t.decide(ctx, fullMethod, who, err)
	if refusal != nil && t.turned != nil {
		user := "unknown"
		if err == nil {
			user = who.identity.String()
		}
		t.turned(ctx, user, fullMethod, refusal)
	}
	return admitted, refusal
}

// decide admits who calls a method, or err says that it is not known who.
func (t *Trust) decide(ctx context.Context, fullMethod string, who caller, err error) (context.Context, error) {
	name := strings.TrimPrefix(fullMethod, "/")
	service, _, _ := strings.Cut(name, "/")
	if service == "grpc.health.v1.Health" {
		if err == nil {
			ctx = context.WithValue(ctx, callerKey{}, who)
		}
		return ctx, nil
	}
	if err != nil {
		return nil, status.Errorf(codes.Unauthenticated, "%s: %v", name, err)
	}
	if err := t.refused(who); err != nil {
		t.logger.Warn("call of a revoked caller refused", "caller", who.identity.String(), "method", name)
		return nil, err
	}
	anonymous := who.identity.Role == resealv1.Role_ROLE_ANONYMOUS
	allow := t.methods[fullMethod]
	if service == "grpc.reflection.v1.ServerReflection" || service == "grpc.reflection.v1alpha.ServerReflection" {
		allow = []resealv1.Role{resealv1.Role_ROLE_EDGE, resealv1.Role_ROLE_VIEWER}
	}
	switch {
	case admits(allow, who.identity.Role):
		return context.WithValue(ctx, callerKey{}, who), nil
	case anonymous:
		return nil, status.Errorf(codes.Unauthenticated, "%s needs a client certificate (role: %s); this connection has none", name, describe(allow))
	}
	t.logger.Warn("call refused", "caller", who.identity.String(), "method", name, "needs", describe(allow))
	return nil, status.Errorf(codes.PermissionDenied, "%s may not call %s (role needed: %s)", who.identity, name, describe(allow))
}

// describe names the roles of an allow option. Replicas have one of their own, which
// is of no use to others.
func describe(allow []resealv1.Role) string {
	var names []string
	for _, role := range allow {
		if role > resealv1.Role_ROLE_ANONYMOUS && (role != resealv1.Role_ROLE_REPLICA || len(allow) == 1) {
			names = append(names, resealv1.Label(role))
		}
	}
	if len(names) == 0 {
		return "none has it"
	}
	return strings.Join(names, " or ")
}
